"""The paper's case on a model that others have trained: FFN blocks only, TwIST beside FedAvg that is pruned.

The scale `smollm2` is made for it. At a scale without `model.pretrained` both start from the lab's DDP run.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.finetune import PRUNERS, cells_of, pruned_row, row_of, values_of
from twist_fl.experiments.lab import Lab, Task, measure, train
from twist_fl.experiments.recipe import SHUFFLED
from twist_fl.experiments.search import TOGETHER
from twist_fl.experiments.shared import about, by_size, caption, of_perplexity
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import size_label

FFN = "blueprint.setting=ffn"
LR = {"pretrained-twist": "5e-4", "pretrained-rewired": "5e-4", "pretrained-fedavg": "2e-4"}
"""Guessed, one try each."""
CALIBRATION_WINDOWS = 16
"""8,192 tokens at the scale `smollm2`, whose widest layer has 1,536 inputs."""
FEW_DRAWS = 2
"""Random tickets a size of what was not trained for them: before, and of FedAvg."""
BEFORE, SORTED, TWIST, REWIRED, FEDAVG = "before", "before, rewired", "TwIST", "TwIST, rewired", "FedAvg"


def _run(lab: Lab, name: str, *overrides: str) -> Task:
    start = None if lab.base.model.pretrained else runs.DDP
    return train(name, FFN, f"train.lr={LR[name]}", *overrides, after=start)


def _twist(lab: Lab) -> Task:
    return _run(lab, "pretrained-twist", *SHUFFLED, *TOGETHER)


def _rewired(lab: Lab) -> Task:
    return _run(lab, "pretrained-rewired", *SHUFFLED, *TOGETHER, "blueprint.rewire=true")


def _fedavg(lab: Lab) -> Task:
    return _run(lab, "pretrained-fedavg", "algorithm=fedavg", f"eval.tickets={FEW_DRAWS}")


def _start(lab: Lab, run: Task) -> Task:
    return measure("start", run, sizes=lab.base.eval.sizes, draws=FEW_DRAWS)


def _pruned(lab: Lab, method: str) -> list[Task]:
    settings = {"method": method, "setting": "ffn", "calibration": CALIBRATION_WINDOWS}
    return [measure("prune", _fedavg(lab), **settings, size=size) for size in lab.base.eval.sizes]


def tasks(lab: Lab) -> list[Task]:
    trained = [_twist(lab), _rewired(lab), _fedavg(lab)]
    first = [] if lab.base.model.pretrained else [runs.DDP]
    starts = [_start(lab, _fedavg(lab)), _start(lab, _rewired(lab))]
    return [*first, *trained, *starts, *(task for method in PRUNERS.values() for task in _pruned(lab, method))]


def collect(lab: Lab) -> Data:
    starts = {BEFORE: _fedavg(lab), SORTED: _rewired(lab)}
    trained = {TWIST: _twist(lab), REWIRED: _rewired(lab), FEDAVG: _fedavg(lab)}
    rows = {name: lab.result(_start(lab, run)) for name, run in starts.items()}
    rows |= {name: row_of(lab, run) for name, run in trained.items()}
    for label, method in PRUNERS.items():
        rows[f"{FEDAVG}, then {label}"] = pruned_row(lab, rows[FEDAVG], _pruned(lab, method))
    config = lab.base
    rounds = {task.name: lab.result(task)["rounds"] for task in trained.values()}
    tokens = {
        name: number * config.train.workers * config.train.interval * config.train.batch_size * config.data.window
        for name, number in rounds.items()
    }
    return {"about": about(lab) | {"tokens": tokens, "window": config.data.window}, "rows": rows}


def tables(data: Data) -> dict[str, Cells]:
    sizes = ["full model", *map(size_label, data["rows"][BEFORE]["tickets"])]
    return {
        caption(of_perplexity("a pretrained model, FFN blocks; of tickets mean ± deviation"), data): [
            ["fine-tuned by", *sizes],
            *([name, *cells_of(row)] for name, row in data["rows"].items()),
        ]
    }


def draw(data: Data) -> Figure:
    """Perplexity against the FFN blocks kept, down from the full model; what was not trained is in the table only."""
    rows = {name: row for name, row in data["rows"].items() if name not in (BEFORE, SORTED)}
    lines = {name: [(value, None) for value in values_of(row)] for name, row in rows.items()}
    return by_size(lines, data["rows"][BEFORE]["tickets"])


def reading(data: Data) -> str:
    return (
        f"Perplexity: {LOWER}. TwIST's points are means over {data['about']['tickets']} random tickets, FedAvg's over "
        f"{FEW_DRAWS}; pruned models are one a size. Seed {data['about']['seed']}."
    )


def notes(data: Data) -> list[str]:
    tokens, rows = data["about"]["tokens"], data["rows"]
    rates = ", ".join(f"{name.removeprefix('pretrained-')} {rate}" for name, rate in LR.items())
    found = [
        f"{max(tokens.values()):,} tokens of fine-tuning each, over all workers, in windows of "
        f"{data['about']['window']}; learning rates: {rates}, one try each. One seed: a proof that it works, not a "
        "comparison that is finished.",
        f"Random tickets before fine-tuning and of FedAvg are means over {FEW_DRAWS} draws a size.",
    ]
    for i, ticket in enumerate(rows[BEFORE]["tickets"]):
        pruned = {name: row["tickets"][i]["mean"] for name, row in rows.items() if name.startswith(f"{FEDAVG}, ")}
        best = min(pruned, key=lambda name: pruned[name])
        ours = [rows[name]["tickets"][i]["mean"] / pruned[best] for name in (REWIRED, TWIST)]
        found.append(
            f"{size_label(ticket)}: TwIST's random tickets have {ours[0]:.2f} of the perplexity of the best pruned "
            f"model, '{best}'; without rewiring {ours[1]:.2f}."
        )
    return found


PRETRAINED = Experiment(
    "pretrained",
    "A pretrained model, fine-tuned by TwIST",
    tasks,
    collect,
    tables,
    {"pretrained": draw},
    reading,
    notes,
)
