"""The paper's case on a model that others have trained: TwIST beside FedAvg that is pruned; FFN blocks only, or both.

The scale `smollm2` is made for it. At a scale without `model.pretrained` both start from the lab's DDP run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from twist_fl.blueprint.division import Setting
from twist_fl.config.shares import Size
from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.finetune import PRUNERS, cells_of, pruned_row, row_of, values_of
from twist_fl.experiments.lab import Lab, Task, measure, train
from twist_fl.experiments.recipe import SHUFFLED
from twist_fl.experiments.search import MOMENTUM, TOGETHER
from twist_fl.experiments.shared import about, by_size, caption, of_perplexity
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import size_label

LR = {"pretrained-twist": "5e-4", "pretrained-rewired": "5e-4", "pretrained-both": "5e-4", "pretrained-fedavg": "2e-4"}
"""Guessed, one try each."""
CALIBRATION_WINDOWS = 16
"""8,192 tokens at the scale `smollm2`, whose widest layer has 1,536 inputs."""
FEW_DRAWS = 2
"""Random tickets a size of what was not trained for them: before, and of FedAvg."""
BEFORE, SORTED, TWIST, REWIRED, FEDAVG = "before", "before, rewired", "TwIST", "TwIST, rewired", "FedAvg"
SHARES = ("2/3", "1/2", "1/3", "1/4")
REWIRE = "blueprint.rewire=true"
SHARED_OUT = (
    *("blueprint.num_sub=1/1,1/2,1/3,1/4", "blueprint.assign=shuffled", "blueprint.common=1/4"),
    *(*MOMENTUM, "blueprint.scale=none", "train.beta2=0.99", REWIRE, f"eval.sizes={','.join(SHARES)}"),
)
"""The preset `finetune`'s workers, by shares: with 3 key/value heads and 12 FFN blocks 3+12, 2+6, 1+4 and 1+3."""


def _run(lab: Lab, name: str, setting: Setting, *overrides: str) -> Task:
    start = None if lab.base.model.pretrained else runs.DDP
    return train(name, f"blueprint.setting={setting}", f"train.lr={LR[name]}", *overrides, after=start)


def _fedavg(lab: Lab) -> Task:
    """It divides nothing while it trains: one run for both settings."""
    return _run(lab, "pretrained-fedavg", "ffn", "algorithm=fedavg", f"eval.tickets={FEW_DRAWS}")


@dataclass(frozen=True)
class Divided:
    """What is divided, of how many blocks tickets are, and how each of TwIST's runs is trained."""

    setting: Setting
    runs: Mapping[str, tuple[str, tuple[str, ...]]]
    """By the row's label: the run's name and its settings."""
    before: Sequence[str]
    """Rows of the model before it was trained."""
    shares: Sequence[Size] = ()
    """Of tickets; eval.sizes of the scale if there are none."""

    def twist(self, lab: Lab) -> dict[str, Task]:
        return {label: _run(lab, name, self.setting, *words) for label, (name, words) in self.runs.items()}

    def starts(self, lab: Lab) -> dict[str, Task]:
        """What runs start from; as it is by FedAvg's settings, which fold the scale factor into tickets."""
        runs, settings = self.twist(lab), {"sizes": self._sizes(lab), "draws": FEW_DRAWS}
        of = {label: run for label, run in ((BEFORE, _fedavg(lab)), (SORTED, runs[REWIRED])) if label in self.before}
        return {label: measure("start", run, **settings) for label, run in of.items()}

    def dense(self, lab: Lab) -> Task:
        """FedAvg's random tickets."""
        return measure("tickets", _fedavg(lab), setting=self.setting, sizes=self._sizes(lab), draws=FEW_DRAWS)

    def pruned(self, lab: Lab, method: str) -> list[Task]:
        settings = {"method": method, "setting": self.setting, "calibration": CALIBRATION_WINDOWS}
        return [measure("prune", _fedavg(lab), **settings, size=size) for size in self._sizes(lab)]

    def _sizes(self, lab: Lab) -> list[Size]:
        return list(self.shares or lab.base.eval.sizes)

    def tasks(self, lab: Lab) -> list[Task]:
        first = [] if lab.base.model.pretrained else [runs.DDP]
        measured = [*self.starts(lab).values(), self.dense(lab)]
        zeroed = [task for method in PRUNERS.values() for task in self.pruned(lab, method)]
        return [*first, *self.twist(lab).values(), _fedavg(lab), *measured, *zeroed]

    def collect(self, lab: Lab) -> Data:
        twist, fedavg, config = self.twist(lab), _fedavg(lab), lab.base
        rows = {name: lab.result(start) for name, start in self.starts(lab).items()}
        rows |= {name: row_of(lab, run) for name, run in twist.items()}
        rows[FEDAVG] = {"full": lab.result(fedavg)["full"], **lab.result(self.dense(lab))}
        for label, method in PRUNERS.items():
            rows[f"{FEDAVG}, then {label}"] = pruned_row(lab, rows[FEDAVG], self.pruned(lab, method))
        batch = config.train.workers * config.train.interval * config.train.batch_size * config.data.window
        tokens = {run.name: lab.result(run)["rounds"] * batch for run in (*twist.values(), fedavg)}
        return {"about": about(lab) | {"tokens": tokens, "window": config.data.window}, "rows": rows}

    def tables(self, data: Data) -> dict[str, Cells]:
        sizes = ["full model", *map(size_label, data["rows"][FEDAVG]["tickets"])]
        blocks = "FFN blocks" if self.setting == "ffn" else "attention and FFN"
        return {
            caption(of_perplexity(f"a pretrained model, {blocks}; of tickets mean ± deviation"), data): [
                ["fine-tuned by", *sizes],
                *([name, *cells_of(row)] for name, row in data["rows"].items()),
            ]
        }


def draw(data: Data) -> Figure:
    """Perplexity against the blocks kept, down from the full model; what was not trained is in the table only."""
    rows = {name: row for name, row in data["rows"].items() if name not in (BEFORE, SORTED)}
    lines = {name: [(value, None) for value in values_of(row)] for name, row in rows.items()}
    return by_size(lines, data["rows"][FEDAVG]["tickets"])


def reading(data: Data) -> str:
    return (
        f"Perplexity: {LOWER}. TwIST's points are means over {data['about']['tickets']} random tickets, FedAvg's over "
        f"{FEW_DRAWS}; pruned models are one a size. Seed {data['about']['seed']}."
    )


def notes(data: Data) -> list[str]:
    tokens, rows = data["about"]["tokens"], data["rows"]
    rates = ", ".join(f"{name.removeprefix('pretrained-')} {LR[name]}" for name in tokens)
    found = [
        f"{max(tokens.values()):,} tokens of fine-tuning each, over all workers, in windows of "
        f"{data['about']['window']}; learning rates: {rates}, one try each. One seed: a proof that it works, not a "
        "comparison that is finished.",
        f"Random tickets before fine-tuning and of FedAvg are means over {FEW_DRAWS} draws a size. "
        "FedAvg's, and those of the model as it was, have the scale factor 1/sqrt(kappa); TwIST was trained without.",
    ]
    ours = [name for name in (REWIRED, TWIST) if name in rows]
    for i, ticket in enumerate(rows[FEDAVG]["tickets"]):
        pruned = {name: row["tickets"][i]["mean"] for name, row in rows.items() if name.startswith(f"{FEDAVG}, ")}
        best = min(pruned, key=lambda name: pruned[name])
        first, *rest = (f"{rows[name]['tickets'][i]['mean'] / pruned[best]:.2f}" for name in ours)
        found.append(
            f"{size_label(ticket)}: TwIST's random tickets have {first} of the perplexity of the best pruned model, "
            f"'{best}'{''.join(f'; without rewiring {each}' for each in rest)}."
        )
    return found


def _experiment(name: str, title: str, of: Divided) -> Experiment:
    return Experiment(name, title, of.tasks, of.collect, of.tables, {name: draw}, reading, notes)


PRETRAINED = _experiment(
    "pretrained",
    "A pretrained model, fine-tuned by TwIST",
    Divided(
        "ffn",
        {
            TWIST: ("pretrained-twist", (*SHUFFLED, *TOGETHER)),
            REWIRED: ("pretrained-rewired", (*SHUFFLED, *TOGETHER, REWIRE)),
        },
        (BEFORE, SORTED),
    ),
)
PRETRAINED_BOTH = _experiment(
    "pretrained-both",
    "A pretrained model, attention and FFN fine-tuned by TwIST",
    Divided("both", {REWIRED: ("pretrained-both", SHARED_OUT)}, (SORTED,), SHARES),
)
