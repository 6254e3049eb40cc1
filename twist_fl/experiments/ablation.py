"""What each choice changes at `both` 6/12: one key at a time, all at the same budget of batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.cost import state_bytes
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.config.sizes import ticket_size
from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.experiments.shared import of_perplexity
from twist_fl.report.cells import Cells
from twist_fl.report.compare import MISSING
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import LOG_FROM, NO_LINE, figure_of, log_ticks, looks_of
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trained import TrainedRun
from twist_fl.system.units import human_bytes, perplexity_text, size_label
from twist_fl.tickets.evaluate import subnet_perplexity
from twist_fl.training.job import Job

MIXED = "blueprint.num_sub=[12,6,4,3]"
DRAWN = (6, 3)
"""Ticket sizes in the figure."""
STATES = ("server", "reset", "client")
ORDERED = (
    runs.variation("ordered", "blueprint.policy=ordered"),
    runs.variation("ordered-mixed", "blueprint.policy=ordered", MIXED),
)


WHOLE = {"FedAvg": runs.FEDAVG, "DDP": runs.DDP}


def varied(lab: Lab) -> dict[str, Task]:
    """The runs by what is different in them from the base, which is first."""
    base = lab.base.train.optimizer_state
    states = [state for state in STATES if state != base]
    return {
        f"base: random, sqrt, moments {base}": runs.twist("both", 6),
        **{f"moments {s}": runs.variation(f"moments-{s}", f"train.optimizer_state={s}") for s in states},
        **{f"scale {s}": runs.variation(f"scale-{s}", f"blueprint.scale={s}") for s in ("linear", "none")},
        "sizes 12, 6, 4, 3": runs.variation("mixed", MIXED),
        "sizes 12, 6, 4, 3 shuffled": runs.variation("mixed-shuffled", MIXED, "blueprint.assign=shuffled"),
        "sizes 12, 6, 4, 3 drawn": runs.variation("mixed-drawn", MIXED, "blueprint.assign=drawn"),
        "rolling": runs.variation("rolling", "blueprint.policy=rolling"),
        "static": runs.variation("static", "blueprint.policy=static"),
        "importance, |C| = 2": runs.variation(
            "importance", "blueprint.policy=importance", "blueprint.common=2", "blueprint.score_every=20"
        ),
        "|C| = 2, sizes 12, 6, 4, 3 shuffled": runs.variation(
            "common-2-mixed", "blueprint.common=2", MIXED, "blueprint.assign=shuffled"
        ),
        "ordered": ORDERED[0],
        "ordered, sizes 12, 6, 4, 3": ORDERED[1],
        **WHOLE,
    }


def interval_bytes(job: Job) -> dict[str, float]:
    """Weights and moments that an interval moves, both ways, all workers (Appendix C); of drawn sizes the run's mean.

    Of DDP, the gradients are counted with the weights, once a batch.
    """
    plain = replace(job.division, policy="random", ticket_policy="random", common=(0, 0))
    workers, seed = job.config.train.workers, job.config.seed
    if job.config.algorithm == "twist":
        rounds = range(1, job.num_rounds + 1)
        sizes = Counter(size for round_ in rounds for size in job.division.sizes(job.layout, seed, round_))
        held = [(draw_ticket(job.layout, plain, size, 0, 0), times / len(rounds)) for size, times in sizes.items()]
    else:
        held = [(full_blueprint(job.layout), workers * job.rounds_per_interval)]

    def moved(layout: Layout) -> float:
        return 2.0 * sum(times * state_bytes(layout, blueprint) for blueprint, times in held)

    return {"weights": moved(job.layout), "moments": sum(map(moved, job.moment_layouts.values()))}


def ordered_tickets(folder: RunFolder, *, sizes: list[int]) -> dict[str, Any]:
    """Perplexity of the tickets that hold each layer's first blocks, which nested subnets are trained for."""
    run = TrainedRun(folder.path)
    job, state = run.job, run.state
    division = replace(job.division, ticket_policy="ordered")
    windows, config, models = run.test, job.config, run.models
    rows = []
    for size in sizes:
        chosen = ticket_size(job.layout, division, size)
        ticket = draw_ticket(job.layout, division, chosen.num_sub, config.seed, 0)
        value = subnet_perplexity(models, state.params, [ticket], windows, config.eval.batch_size)
        rows.append(chosen.row | {"mean": value})
    return {"tickets": rows}


def _ordered(lab: Lab) -> dict[str, Task]:
    return {run.name: measure("ordered_tickets", run, sizes=lab.base.eval.sizes) for run in ORDERED}


def tasks(lab: Lab) -> list[Task]:
    return [*varied(lab).values(), *_ordered(lab).values()]


def collect(lab: Lab) -> Data:
    rows: list[Data] = []
    for label, task in varied(lab).items():
        results = lab.result(task)
        row = {"label": label, "full": results["full"], "tickets": results["tickets"]}
        row |= {"interval_bytes": interval_bytes(lab.run(task.name).job())}
        rows.append(row | {"draws": results["config"]["eval"]["tickets"], "seed": results["config"]["seed"]})
        if task.name in _ordered(lab):
            tickets = lab.result(_ordered(lab)[task.name])["tickets"]
            rows.append(row | {"label": f"{label}; ordered tickets", "tickets": tickets})
    return {"rows": rows}


def tables(data: Data) -> dict[str, Cells]:
    sizes = [size_label(ticket) for ticket in data["rows"][0]["tickets"]]
    what, rows = "TwIST, both 6/12, with", data["rows"]
    return {
        of_perplexity("by what is changed"): [
            [what, "full model", *sizes],
            *([row["label"], perplexity_text(row["full"]), *map(_ticket, row["tickets"])] for row in rows),
        ],
        "What is sent per interval, by what is changed": [
            [what, "weights", "moments"],
            *([row["label"], *_sent(row["interval_bytes"])] for row in rows),
        ],
    }


def _sent(moved: Data) -> list[str]:
    return [human_bytes(round(moved[key])) if moved[key] else MISSING for key in ("weights", "moments")]


def _ticket(ticket: Data) -> str:
    mean = perplexity_text(ticket["mean"])
    return f"{mean} ± {perplexity_text(ticket['std'])}" if "std" in ticket else mean


def draw(data: Data) -> Figure:
    """A line for each change: the full model and the mean of random tickets; the base's values go through all."""
    rows = data["rows"]
    shown = {"full model": [row["full"] for row in rows]}
    for i, ticket in enumerate(rows[0]["tickets"]):
        if ticket["size"] in DRAWN:
            shown[f"{size_label(ticket)} tickets"] = [row["tickets"][i]["mean"] for row in rows]
    labels = [fill(row["label"], 26) for row in rows]
    looks = {label: look | NO_LINE for label, look in looks_of(shown).items()}
    figure = figure_of(0.6 + 0.15 * sum(label.count("\n") + 2 for label in labels), looks)
    axes = figure.subplots()
    for values, look in zip(shown.values(), looks.values(), strict=True):
        axes.plot(values, range(len(rows)), **look, markersize=5)
        axes.axvline(values[0], color=look["color"], linewidth=0.8, linestyle="--", alpha=0.7)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylabel("what is changed at both 6/12")
    axes.invert_yaxis()
    every = [value for values in shown.values() for value in values]
    if max(every) > LOG_FROM * min(every):
        axes.set_xscale("log")
        ticks = log_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"test perplexity ({LOWER})")
    return figure


def reading(data: Data) -> str:
    base = data["rows"][0]
    return (
        f"Perplexity: {LOWER}. "
        f"A line is one training run; tickets are means over {base['draws']} random ones. Dashed: the base's values. "
        f"Seed {base['seed']}."
    )


def notes(data: Data) -> list[str]:
    base, *_ = data["rows"]
    found = [
        f"Tickets are {base['draws']} random ones a size (mean ± deviation) with the run's own scale and common "
        "blocks; 'ordered tickets' hold each layer's first blocks and there is one a size. "
        f"Seed {base['seed']}, one run a line.",
        "Bytes are by the cost model, both ways, all workers; of DDP they are its gradients and the weights back, once "
        "a batch.",
    ]
    found.append(_best("The full model is", [(row["label"], row["full"]) for row in data["rows"]]))
    for i, ticket in enumerate(base["tickets"]):
        means = [(row["label"], row["tickets"][i]["mean"]) for row in data["rows"]]
        found.append(_best(f"Tickets of {size_label(ticket)} are", means))
    return found


def _best(what: str, values: list[tuple[str, float]]) -> str:
    """Of (label, perplexity), the base first."""
    label, best = min((pair for pair in values if pair[0] not in WHOLE), key=lambda pair: pair[1])
    whole = ", ".join(f"{label} {perplexity_text(value)}" for label, value in values if label in WHOLE)
    base = perplexity_text(values[0][1])
    return f"{what} best of TwIST's with '{label}': {perplexity_text(best)}; the base has {base}, {whole}."


ABLATION = Experiment(
    "ablation", "What each choice changes", tasks, collect, tables, {"ablation": draw}, reading, notes
)
