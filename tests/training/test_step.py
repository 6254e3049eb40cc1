"""How a step is computed: precision, compilation, no waiting for the device."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twist_fl.config.schema import TrainConfig, load_config
from twist_fl.model import subnet
from twist_fl.model.subnet import ModelCache, State, get_state
from twist_fl.rounds import dispatch, plan, run, start
from twist_fl.system.errors import ConfigError
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import train_interval
from twist_fl.training.job import Job
from twist_fl.training.precision import check_precision, product_precision
from twist_fl.training.worker import Worker

MakeJob = Callable[..., Job]
ONE_LAYER = ("model.n_layer=1", "blueprint.undivided_first=0", "blueprint.undivided_last=0")


def params_of(job: Job, folder: Path) -> State:
    return run(job, start(job), folder).params


def difference(ours: State, theirs: State) -> float:
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


# Precision


@pytest.mark.parametrize("chunk", [7, 256])
def test_bfloat16_is_the_same_training_a_little_coarser(chunk: int, tiny_job: MakeJob, tmp_path: Path) -> None:
    overrides = ("train.eps=1e-3", f"train.loss_chunk={chunk}")
    exact = params_of(tiny_job(*overrides), tmp_path)
    coarse = params_of(tiny_job(*overrides, "train.precision=bfloat16"), tmp_path)
    moved = difference(exact, tiny_job().initial_state())
    assert all(value.dtype == torch.float32 for value in coarse.values())
    assert 0 < difference(coarse, exact) < moved / 2


def test_bfloat16_sees_the_weights_of_every_step(tiny_job: MakeJob) -> None:
    """Autocast caches its copies: held open over two steps, the second would use the first one's weights."""
    job = tiny_job()
    batches = [torch.tensor(job.corpus.train[:2], dtype=torch.int64)] * 2
    config = TrainConfig(lr=1e-1, precision="bfloat16")
    once, twice = (job.models().load_sliced(job.blueprints(1)[0], job.initial_state()) for _ in range(2))
    moments = train_interval(once, batches[:1], config, 0).moments
    train_interval(once, batches[1:], config, 0, moments)
    train_interval(twice, batches, config, 0)
    assert difference(get_state(once), get_state(twice)) == 0


def test_tf32_is_refused_where_there_is_none(tiny_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tf32 needs a CUDA GPU, this worker trains on 'cpu': use float32"):
        Worker(tiny_job("train.precision=tf32"), MomentShelf(tmp_path))
    check_precision("tf32", "cuda:1")


def test_tf32_is_switched_on_and_back() -> None:
    before = torch.get_float32_matmul_precision()
    with product_precision("tf32", torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    with product_precision("tf32", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_unknown_precision_and_chunk() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision"):
        load_config(overrides=["train.precision=float8"])
    with pytest.raises(ConfigError, match=r"train\.loss_chunk=0 must be more than 0"):
        load_config(overrides=["train.loss_chunk=0"])


# Nothing waits for the device


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes the host read a number of the device: item(), bool(), float()."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", [(), ("train.loss_chunk=7",), ("train.precision=bfloat16",)])
def test_an_interval_reads_the_device_once_at_its_end(overrides: tuple[str, ...], tiny_job: MakeJob) -> None:
    job = tiny_job("model.dropout=0.1", *overrides)
    model = job.models().load_sliced(job.blueprints(1)[0], job.initial_state())
    windows = torch.tensor(job.corpus.train[:8], dtype=torch.int64)

    def batches(reads: Reads) -> Iterator[torch.Tensor]:
        for batch in torch.split(windows, 2):
            assert reads.count == 0
            yield batch

    with Reads() as reads:
        train_interval(model, batches(reads), job.config.train, 0)
    # On a CPU, fused Adam itself reads no number; the one read is the interval's mean loss.
    assert reads.count == 1


def test_batches_are_read_when_they_are_needed(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job()
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    task = plan(job, state)[1]
    batches = worker.batches(task)
    assert isinstance(batches, Iterator)
    expected = [job.corpus.train[job.shard(1).batch(cursor)] for cursor in range(2)]
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours, torch.tensor(theirs, dtype=torch.int64))


# Compilation


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts compilations; the graph is then run as it is, which takes no compiler's time."""
    found: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        found.append(1)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(ModelCache, "backend", staticmethod(backend))
    return found


def test_a_run_compiles_once_per_shape(compilations: list[int], tiny_job: MakeJob, tmp_path: Path) -> None:
    """Three workers, two of one size, over three rounds: new weights and new blueprints compile nothing."""
    overrides = ("blueprint.num_sub=[2,2,3]", "train.rounds=3", "train.eps=1e-3", *ONE_LAYER)
    compiled = params_of(tiny_job(*overrides, "train.compile=true"), tmp_path)
    assert len(compilations) == 2
    plain = params_of(tiny_job(*overrides), tmp_path)
    assert len(compilations) == 2
    assert difference(compiled, plain) < 2e-6


def test_more_shapes_than_torch_expects_are_all_compiled(compilations: list[int], tiny_job: MakeJob) -> None:
    """Torch gives up after 8 compilations of one piece of code."""
    job = tiny_job("train.compile=true", "train.workers=9", *ONE_LAYER,
                   "blueprint.num_sub=1+1,2+1,3+1,4+1,1+2,2+2,3+2,4+2,1+3")  # fmt: skip
    models, state = job.models(compile=True), job.initial_state()
    windows = torch.zeros((1, 16), dtype=torch.int64)
    for blueprint in job.blueprints(1):
        models.load_sliced(blueprint, state)(windows, use_cache=False)
    assert len(compilations) == 9


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_training(tiny_job: MakeJob, tmp_path: Path) -> None:
    """The real compiler and the scale hooks: the same step to rounding, and twice the same bits."""
    torch._dynamo.reset()
    overrides = (*ONE_LAYER, "train.eps=1e-3")
    found = []
    for compile in ("true", "true", "false"):
        job = tiny_job(*overrides, f"train.compile={compile}")
        worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
        task = plan(job, state)[0]
        found.append({name: v.clone() for name, v in worker.train(task, *dispatch(job, state, task)).params.items()})
    assert difference(found[0], found[1]) == 0
    assert difference(found[0], found[2]) < 2e-6


def test_compiling_is_refused_where_it_cannot_work(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job("train.compile=true")
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        Worker(job, MomentShelf(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(subnet, "find_spec", lambda _name: None)
    monkeypatch.setattr(shutil, "which", lambda _name: "found")
    with pytest.raises(ConfigError, match="needs triton on a GPU"):
        subnet.check_compiler("cuda")
    subnet.check_compiler("cpu")
