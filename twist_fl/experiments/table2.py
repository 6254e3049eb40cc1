"""Table 2: memory, communication and wall clock of a worker, by setting and subnet size."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.cost import PAPER_EXCHANGES, run_cost
from twist_fl.blueprint.division import Division, Setting
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.latency import FULL, MEASURE, SIZES, shape_name
from twist_fl.experiments.runs import DDP
from twist_fl.experiments.shared import BLOCKS, PAPER, about, label
from twist_fl.report.cells import Cells

WORKERS = 4


def tasks(lab: Lab) -> list[Task]:
    return [DDP, MEASURE]


def collect(lab: Lab) -> Data:
    measured = lab.result(MEASURE)
    ms = measured.pop("ms")
    rows = [_row(setting, size, ms[shape_name(setting, size)] / ms[FULL]) for setting in lab.settings for size in SIZES]
    paper = PAPER["table2"]["rows"]
    whole_paper = _seconds(paper["DDP"][label(BLOCKS)][2])
    for row in (*rows, ddp := _row(None, BLOCKS, 1.0)):
        gigabytes, terabytes, clock = paper[row["setting"]][row["size"]]
        row["paper"] = {"memory": gigabytes, "terabytes": terabytes, "wall_clock": _seconds(clock) / whole_paper}
    return {"about": about(lab), "ddp_ms": ms[FULL], "measured": measured, "rows": [*rows, ddp]}


def _row(setting: Setting | None, size: int, wall_clock: float) -> dict[str, Any]:
    """GPT-2 124M with the first and last two layers whole; `wall_clock` is relative to DDP. `setting` None is DDP."""
    layout = make_layout(GPT2Config().to_dict())
    division = Division(setting, ((size, size),) * WORKERS) if setting else None
    run = run_cost(layout, division, rounds=0, steps=PAPER_EXCHANGES)
    return {
        "setting": setting or "DDP",
        "size": label(size),
        "memory": run.memory_gib,
        "terabytes": run.tb_per_step,
        "wall_clock": wall_clock,
    }


def _seconds(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def tables(data: Data) -> dict[str, Cells]:
    scale = data["about"]["scale"]
    size = ["setting", "blocks kept"]
    return {
        "Memory and communication of a worker of GPT-2 124M, computed": [
            [*size, "memory GiB", "paper GB", "communication TB", "paper TB"],
            *_lines(data, {"memory": 2, "terabytes": 2}),
        ],
        f"Wall clock, of DDP's, measured at scale {scale}": [
            [*size, "ours", "paper's"],
            *_lines(data, {"wall_clock": 3}),
        ],
    }


def _lines(data: Data, decimals: dict[str, int]) -> Cells:
    """Our number and the paper's of each key."""
    return [
        [
            row["setting"],
            row["size"],
            *(f"{values[key]:.{digits}f}" for key, digits in decimals.items() for values in (row, row["paper"])),
        ]
        for row in data["rows"]
    ]


def notes(data: Data) -> list[str]:
    rows = data["rows"]
    memory = max(abs(row["memory"] - row["paper"]["memory"]) for row in rows)
    traffic = max(abs(row["terabytes"] - row["paper"]["terabytes"]) for row in rows)
    fastest = min(rows, key=lambda row: row["wall_clock"])
    return [
        f"Memory is weight, gradient and two moments in float32, plus 0.06 GiB; communication is {PAPER_EXCHANGES:,} "
        "exchanges of weights, as the paper counts, one per optimiser step. Largest distances from the paper: "
        f"{memory:.3f} and {traffic:.3f} TB.",
        "Our wall clock is that of the same number of training steps, as Figure 6 measures them: medians of "
        f"{data['measured']['turns']} turns of {data['measured']['batches']} batches, the shapes one after another in "
        f"one process ({data['ddp_ms']:.1f} ms a batch for DDP). The paper's contains exchange and evaluation, as does "
        f"docs/performance.md, with real DDP for its rival. Seed {data['about']['seed']}.",
        f"Shortest: {fastest['setting']} {fastest['size']} with {fastest['wall_clock']:.3f} of DDP's time "
        f"(paper: {fastest['paper']['wall_clock']:.3f}).",
    ]


TABLE2 = Experiment("table2", "Table 2: memory, communication and wall clock", tasks, collect, tables, notes=notes)
