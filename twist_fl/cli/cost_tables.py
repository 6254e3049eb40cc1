"""`twist-fl cost`: Appendix C of a setting or of a model, and of a run beside what it measured; no Flower here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.cost import (
    BYTES_PER_PARAM,
    PAPER_EXCHANGES,
    Group,
    RunCost,
    groups,
    run_cost,
    server_bytes,
    state_bytes,
    step_flops,
)
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.moments import moment_layouts
from twist_fl.config.hub import expanded, is_path
from twist_fl.config.schema import Config, ModelConfig, load_config
from twist_fl.config.sizes import layout_of, make_division, server_copies, ticket_sizes, workers_per_round
from twist_fl.data.gguf_folder import SUFFIX
from twist_fl.model.hf_config import pretrained_config, scratch_fields
from twist_fl.report.cells import titled, uncut_table
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.units import count, human_bytes, size_label
from twist_fl.training.fitting import teacher_fields

GPT2_VOCABULARY = 50_257


def show_cost(console: Console, preset: str, overrides: list[str], steps: int | None) -> None:
    """A line for every subnet size of a setting, then for its own workers; both countings of communication.

    `preset` may be a run's folder: then what it measured stands beside; or a model, of which workers hold half.
    `steps`: the run's; of a setting, as many as train.rounds says, or the paper's.
    """
    folder = RunFolder(Path(preset))
    if not folder.job_file.is_file():
        model = [f"model.pretrained={preset}", "blueprint.num_sub=1/2"] if _is_model(preset) else []
        config = load_config(None if model else preset, [*model, *overrides])
        planned = (config.train.rounds or 0) * config.train.interval
        _show(console, preset, config, _model_dict(config), steps or planned or PAPER_EXCHANGES)
        return
    if overrides:
        raise ConfigError(f"{preset} is a run, which keeps its settings: leave out {' '.join(overrides)}")
    job = folder.job()
    _show(console, preset, job.config, job.model_fields, steps or job.total_batches)
    console.print(_measured(folder, len(job.moment_layouts)))


def _is_model(name: str) -> bool:
    """Whether it is a model's folder or file, or org/name on the hub; a word alone is a preset."""
    path = expanded(name)
    return path.suffix == SUFFIX or (path / "config.json").is_file() or ("/" in name and not is_path(name))


def _model_dict(config: Config) -> dict[str, Any]:
    """The model's sizes without its weights; for the hub's gpt2, which are the defaults, no network is needed."""
    if config.model.pretrained in ("gpt2", "openai-community/gpt2"):
        return scratch_fields(ModelConfig(), GPT2_VOCABULARY)
    if config.model.pretrained is None:
        return scratch_fields(config.model, config.data.vocab_size)
    return pretrained_config(config.model.pretrained).to_dict()


def _show(console: Console, title: str, config: Config, model: Mapping[str, Any], steps: int) -> None:
    ddp = config.algorithm == "ddp"
    rounds = steps if ddp else -(-steps // config.train.interval)
    if config.blueprint.assign != "fixed" and rounds > _MOST_DRAWN:
        most = _MOST_DRAWN * (1 if ddp else config.train.interval)
        raise ConfigError(
            f"{steps:,} steps are {rounds:,} rounds, and sizes that are {config.blueprint.assign} are counted round by "
            f"round: use --steps {most} at most"
        )
    try:
        layout = layout_of(config, model)
        division = make_division(config, layout)
        division.check(layout, coverage=config.algorithm == "twist")
        travel = {} if ddp else moment_layouts(config.train.optimizer_state, layout)
        moments = travel.values()
        sizes = _of_sizes(layout, division, rounds, steps, moments)
        sent = _sent(config, layout, division)
        found = groups(layout, sent, config.seed, rounds, steps, _first_client(config), moments)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    title = f"{title}, {division.setting}: one worker, {steps:,} optimiser steps"
    columns = _COLUMNS if moments else {name: of for name, of in _COLUMNS.items() if name.startswith("weights")}
    console.print(_table(title, ["blocks", *_SIZES, *columns], [_line(size, row, columns) for size, row in sizes]))
    workers = [_line(_workers_text(layout, division, group), group.cost, columns) for group in found]
    together = [sum(group.workers * of(group.cost) for group in found) for of in columns.values()]
    workers.append([f"all {sum(group.workers for group in found)}", "", "", *map(_bytes, together)])
    console.print(_table("the workers as they are set", ["workers x blocks", *_SIZES, *columns], workers))
    if (number := workers_per_round(config)) < config.train.workers:
        console.print(
            f"With train.fraction, {number} of {config.train.workers} workers are in a round: that part of it is moved."
        )
    console.print(
        "By step is how the paper's Table 2 counts, one exchange per optimiser step, for TwIST and DDP alike; here, "
        + ("DDP does." if ddp else f"workers exchange once per interval of {config.train.interval} batches.")
        + " Bytes are both ways. GiB are for training: weights, gradients and two moments of the largest subnet held, "
        "without activations." + ("" if moments or ddp else _of_moments(layout)),
        highlight=False,
    )
    shares = sum(group.workers * (1 + group.cost.moments) * group.cost.subnet_params for group in found)
    first = _first_client(config)
    ready = BYTES_PER_PARAM * shares * (number - first) / (config.train.workers - first)
    needed = server_bytes(server_copies(config), layout, moments, ready)
    console.print(
        f"The server needs {human_bytes(needed)} beside its libraries, {human_bytes(ready)} of it for what lies ready "
        "for a round's workers. With flower.transport=inline, or 16 bits on the wire, it is another sum.",
        highlight=False,
    )
    if config.train.distill:
        console.print(_of_teacher(config, layout), highlight=False)


def _of_moments(layout: Layout) -> str:
    (factors,) = moment_layouts("factored", layout).values()
    return (
        " train.optimizer_state=server adds the moments, twice the weights again, and factored "
        f"{factors.num_params() / layout.num_params():.1%} of them."
    )


def _of_teacher(config: Config, layout: Layout) -> str:
    """What distillation adds on a worker: each window is read once, forward, and the answer is kept on its disk."""
    from twist_fl.training.teacher import bytes_per_token

    teacher = make_layout(teacher_fields(str(config.train.teacher)))
    window = config.data.window
    share = step_flops(teacher, None, 1, window) / 3 / step_flops(layout, None, 1, window)  # forward: a third of a step
    return (
        f"train.teacher is asked once for each window: {share:.2f} of the full model's step on it, "
        f"{human_bytes(state_bytes(teacher))} of weights beside the worker's, and "
        f"{human_bytes(bytes_per_token(layout.sizes['vocab']))} a token on its disk. Nothing more travels."
    )


_MOST_DRAWN = 100_000
_SIZES = ("params", "GiB")
_COLUMNS: dict[str, Callable[[RunCost], float]] = {
    "weights by step": lambda cost: cost.tb_per_step,
    "weights by interval": lambda cost: cost.tb_per_interval,
    "moments by step": lambda cost: cost.moments * cost.tb_per_step,
    "moments by interval": lambda cost: cost.moments * cost.tb_per_interval,
}
"""TB of the weights by each counting and, apart from them, of the moments that travel with them."""


def _line(first: str, cost: RunCost, columns: Mapping[str, Callable[[RunCost], float]]) -> list[str]:
    moved = [_bytes(of(cost)) for of in columns.values()]
    return [first, f"{cost.subnet_params:,.0f}", f"{cost.memory_gib:.2f}", *moved]


def _bytes(terabytes: float) -> str:
    return human_bytes(terabytes * 1e12)


def _table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> RenderableType:
    return titled(title, uncut_table([header, *lines]))


def _of_sizes(
    layout: Layout, division: Division, rounds: int, steps: int, moments: Collection[Layout]
) -> list[tuple[str, RunCost]]:
    """A worker's cost for every size that all workers could hold, the largest first."""
    plain = Division(division.setting, (), division.undivided_first, division.undivided_last)
    rows = []
    for size in reversed(ticket_sizes(layout, division)):
        # As many workers as blocks: every size is legal for enough of them.
        num_sub = (size.num_sub,) * max(layout.num_blocks)
        row = run_cost(layout, replace(plain, num_sub=num_sub), rounds, steps, moments)
        rows.append((size_label(size.row), row))
    return rows


def _sent(config: Config, layout: Layout, division: Division) -> Division:
    """What workers are given: where they mask, or nothing is divided, every block."""
    if config.algorithm == "twist" and config.train.variant != "masked":
        return division
    return replace(division, assign="fixed", num_sub=(layout.num_blocks,) * config.train.workers)


def _first_client(config: Config) -> int:
    """In the hybrid variant worker 0 is the server, which sends itself nothing."""
    return int(config.train.variant == "hybrid")


def _workers_text(layout: Layout, division: Division, group: Group) -> str:
    """'4 x 6/12'; of drawn sizes '4 x 3-12/12, mean 6.3'; of kinds that differ, attention's and the FFN's."""
    texts = []
    for i in [i for i, kind in enumerate(KINDS) if division.divides(kind)]:
        sizes, of = [size[i] for size in group.held], layout.num_blocks[i]
        mean = sum(size[i] * times for size, times in group.held.items()) / sum(group.held.values())
        drawn = f"{min(sizes)}-{max(sizes)}/{of}, mean {mean:.1f}"
        texts.append(f"{sizes[0]}/{of}" if min(sizes) == max(sizes) else drawn)
    return f"{group.workers} x {texts[0] if len(set(texts)) == 1 else '; FFN '.join(texts)}"


def _measured(folder: RunFolder, num_moments: int) -> RenderableType:
    """Bytes and peak memory of the run's rounds so far, as the cost model has them and as they were."""
    rounds = folder.events("round")
    sent = {
        kind: sum(each[way].get(kind, 0) for each in rounds for way in ("bytes_down", "bytes_up"))
        for kind in ("weights", "moments", "other")
    }
    anything = any(sent.values())
    measured = {kind: human_bytes(size) if anything else "" for kind, size in sent.items()}
    weights = sum(each["predicted_bytes"] for each in rounds)
    # A log of before there were factors does not say: each moment that travelled was as large as the weights.
    moments = sum(each.get("predicted_moment_bytes", num_moments * each["predicted_bytes"]) for each in rounds)

    def most(*keys: str) -> list[str]:
        found = [max((each.get(key, 0) for each in rounds), default=0) for key in keys]
        return [human_bytes(value) if value else "" for value in found]

    lines = [
        ["weights sent", human_bytes(weights), measured["weights"]],
        ["moments sent", human_bytes(moments), measured["moments"]],
        ["other sent", "", measured["other"]],
        ["worker's peak memory", *most("predicted_peak_bytes", "peak_bytes")],
        ["server's peak memory", *most("predicted_server_bytes", "server_bytes")],
    ]
    how = "all workers" if anything or not rounds else "in one process, nothing was sent"
    return _table(f"{count(len(rounds), 'round')} so far, {how}", ["", "cost model", "measured"], lines)
