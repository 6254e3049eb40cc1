"""What a pruned model really weighs and how fast it really is, beside its perplexity: measured, not counted."""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.sizes import TicketSize, ticket_size
from twist_fl.data.corpus import Windows
from twist_fl.model.subnet import State, fold_scale
from twist_fl.pruning.methods import Pruned, prune, pruned_perplexities, save_pruned
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trained import TrainedRun
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.edge_client import decode
from twist_fl.training.job import Job

FULL = "full"
WINDOW, TOKEN = "ms_per_window", "ms_per_token"
LABELS = {
    FULL: "full model",
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
    "magnitude": "magnitude",
    "block": "Block Prune",
    "se": "random ticket",
}


@dataclass(frozen=True)
class Size:
    """Of an exported model's weights, read from its file."""

    num_params: int
    nonzero: int
    file_bytes: int
    gzip_bytes: int


def weigh(job: Job, pruned: Pruned) -> Size:
    """Export the model as it would be shipped, and count what is in the file."""
    with tempfile.TemporaryDirectory(prefix="twist-cost-") as scratch:
        folder = Path(scratch) / "model"
        save_pruned(job, pruned, folder)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file).values()
        return Size(
            sum(tensor.numel() for tensor in tensors),
            sum(int(tensor.count_nonzero()) for tensor in tensors),
            file.stat().st_size,
            _gzip_bytes(file),
        )


def _gzip_bytes(file: Path) -> int:
    """Of `gzip -6`: piece by piece, so that a large file needs no memory."""
    packed = file.with_suffix(".gz")
    with file.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        while piece := source.read(1 << 20):
            target.write(piece)
    return packed.stat().st_size


def dense_model(job: Job, pruned: Pruned) -> nn.Module:
    """The model that is shipped, on the CPU: the scale is in its weights, so that no hook takes time."""
    blueprint = pruned.blueprint or full_blueprint(job.layout)
    params = {name: tensor.cpu() for name, tensor in pruned.params.items()}
    folded = fold_scale(job.layout, params, blueprint, pruned.scale)
    model: nn.Module = job.models(device="cpu", scale="none").load(blueprint, folded)
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speeds(
    models: Mapping[str, nn.Module], window: torch.Tensor, new_tokens: int, turns: int
) -> dict[str, dict[str, float]]:
    """Median ms per window (1, T) and per generated token of each model, which take turns; one thread.

    The first turn warms up and does not count.
    """
    forward: dict[str, list[float]] = {name: [] for name in models}
    token: dict[str, list[float]] = {name: [] for name in models}
    with _one_thread(), torch.inference_mode():
        for turn in range(turns + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(window, use_cache=False)
                seconds = time.perf_counter() - start
                steps = decode(model, window[:, :-new_tokens], new_tokens)[1]
                if turn:
                    forward[name].append(1e3 * seconds)
                    token[name].append(1e3 * median(steps))
    return {name: {WINDOW: median(forward[name]), TOKEN: median(token[name])} for name in models}


def whole(state: State, size: TicketSize) -> Pruned:
    """The full model as a row beside what pruning makes of it."""
    return Pruned(FULL, size, dict(state), None, "none", 0.0, 0, 0)


def rows_of(
    models: Sequence[tuple[Job, Pruned]], windows: Windows, *, draws: int, new_tokens: int, turns: int
) -> list[dict[str, Any]]:
    """Of each model: perplexity on `windows`, `Size`, speed (all take turns) and the seconds that pruning took.

    Raises ConfigError unless a window is longer than `new_tokens`.
    """
    if new_tokens >= windows.shape[1]:
        raise ConfigError(f"new_tokens={new_tokens} leaves no prompt: a window has data.window={windows.shape[1]}")
    prompt = torch.tensor(windows[:1], dtype=torch.int64)
    dense = {str(i): dense_model(job, pruned) for i, (job, pruned) in enumerate(models)}
    timed = speeds(dense, prompt, new_tokens, turns).values()
    rows = []
    for (job, pruned), speed in zip(models, timed, strict=True):
        config = job.config
        values = pruned_perplexities(job, pruned, windows, config.eval.batch_size, draws=draws, seed=config.seed)
        facts = {"method": pruned.method, **pruned.size.row, "seconds": pruned.seconds}
        rows.append(facts | vars(weigh(job, pruned)) | speed | {"perplexity": fmean(values), "draws": len(values)})
    return rows


def real_cost(
    folder: RunFolder, *, methods: list[str], size: int, draws: int, calibration: int, new_tokens: int, turns: int
) -> dict[str, Any]:
    """`rows_of` a run's full model and of what each method makes of it at `size` blocks. Raises ConfigError as it."""
    run = TrainedRun(folder.path)
    job, params = run.job, run.state.params
    job = replace(job, division=replace(job.division, setting="both"))
    seed, chosen = job.config.seed, ticket_size(job.layout, job.division, size)
    models = [whole(params, ticket_size(job.layout, job.division, "1/1"))]
    models += [prune(job, params, method, chosen, seed=seed, calibration_windows=calibration) for method in methods]
    rows = rows_of([(job, model) for model in models], run.test, draws=draws, new_tokens=new_tokens, turns=turns)
    window = job.config.data.window
    return {"rows": rows, **chosen.row, "seed": seed, "turns": turns, "window": window, "threads": 1}
