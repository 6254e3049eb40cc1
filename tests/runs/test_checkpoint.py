"""A run's folder: exact checkpoints, whole or absent, and a resumed run that ends where an uninterrupted one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from local_grid import Answer, Bend, LocalGrid, assert_same_run, failing, honest, same
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from twist_fl.blueprint.moments import MOMENTS
from twist_fl.data.tokenizer import load_tokenizer
from twist_fl.federation import apps
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.hf_config import config_from_dict
from twist_fl.model.subnet import State, get_state
from twist_fl.rounds import RunState, run, start
from twist_fl.runs import checkpoint
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system import files
from twist_fl.system.errors import ConfigError, DamagedError
from twist_fl.training import client_state
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Task

MODEL = GPT2Config(bos_token_id=0, eos_token_id=0)
MakeJob = Callable[..., Job]
RandomState = Callable[..., State]


class Crash(BaseException):
    """The process dies here: not an Exception, so that nothing on the way mends it."""


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes all cores; here it takes one, as everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


@pytest.fixture
def state(tiny_job: MakeJob, random_state: RandomState) -> RunState:
    """A state in which nothing is at its default."""
    layout = tiny_job().layout
    moments = Moments(17, {name: random_state(layout, 5 + i) for i, name in enumerate(MOMENTS)})
    debt = frozenset({("attn", 1, 3), ("ffn", 2, 0), ("attn", 2, 0)})
    return RunState(random_state(layout), [4, 0, 6], 3, debt, moments)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Checkpoints


@pytest.mark.parametrize("with_moments", [True, False])
def test_what_is_saved_is_loaded(with_moments: bool, state: RunState, tmp_path: Path) -> None:
    if not with_moments:
        state.moments = None
    name = next(iter(state.params))
    state.params[name].view(-1)[:3] = torch.tensor([1e-42, -0.0, torch.finfo().max])  # subnormal, negative zero
    RunFolder(tmp_path).save(state, MODEL)
    loaded = RunFolder(tmp_path).load()
    assert loaded is not None
    assert_same_run(loaded, state)
    assert torch.signbit(loaded.params[name].view(-1)[1])


def test_a_loaded_state_is_no_view_of_the_file(state: RunState, tmp_path: Path) -> None:
    """Rounds are averaged in place: what was loaded is overwritten, and the checkpoint must not be."""
    folder = RunFolder(tmp_path)
    folder.save(state, MODEL)
    loaded = folder.load()
    assert loaded is not None
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    for values in (loaded.params, *(loaded.moments or Moments()).values.values()):
        for tensor in values.values():
            tensor.fill_(7)
    again = folder.load()
    assert again is not None
    assert_same_run(again, state)


def test_a_checkpoint_is_a_model_and_a_start_for_another_run(
    tiny_job: MakeJob, random_state: RandomState, tmp_path: Path
) -> None:
    job = tiny_job()
    state = start(job)
    state.params = random_state(job.layout, 3)
    folder = RunFolder(tmp_path)
    model = config_from_dict(job.model_config.to_dict() | {"dtype": "bfloat16"})  # as it came from a hub
    for state.round in (1, 2):
        folder.save(state, model, job.corpus.tokenizer_folder)
        state.params = random_state(job.layout, 4)
    _, newest = folder.checkpoints()
    assert same(get_state(AutoModelForCausalLM.from_pretrained(newest)), state.params)
    tokenizer, text = load_tokenizer(str(job.corpus.tokenizer_folder)), "the worker holds a block"
    assert AutoTokenizer.from_pretrained(newest)(text)["input_ids"] == tokenizer(text)["input_ids"] != []
    for start_of in (newest, tmp_path):  # a run stands for its newest checkpoint
        other = tiny_job(f"model.pretrained={start_of}")
        assert other.config.model.pretrained == other.config.data.tokenizer == str(newest)
        assert other.layout == job.layout
        assert same(start(other).params, state.params)


def test_a_folder_without_a_model_is_no_start(tiny_job: MakeJob, tmp_path: Path) -> None:
    RunFolder(tmp_path).create(tiny_job())
    with pytest.raises(ConfigError, match=r"holds no model \(no config\.json\): give a run that has a checkpoint"):
        tiny_job(f"model.pretrained={tmp_path}")


def test_a_new_folder_has_no_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "absent")
    assert folder.load() is None
    assert folder.checkpoints() == []
    assert folder.events() == []
    assert not folder.path.exists()


def test_only_the_two_newest_are_kept(state: RunState, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for state.round in (8, 9, 10, 100):
        folder.save(state, MODEL)
        loaded = folder.load()
        assert loaded is not None
        assert loaded.round == state.round
    assert names(tmp_path / "checkpoints") == ["round-000010", "round-000100"]


def test_a_round_saved_again_replaces_the_old_one(state: RunState, random_state: RandomState, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(state, MODEL)
    state.params = {name: value + 1 for name, value in state.params.items()}
    folder.save(state, MODEL)
    loaded = folder.load()
    assert loaded is not None
    assert_same_run(loaded, state)


@pytest.mark.parametrize("dies_in", ["save_tensors", "write_text"])
@pytest.mark.parametrize("error", [OSError("no space left"), Crash()], ids=["error", "crash"])
def test_a_save_that_dies_leaves_the_last_checkpoint(
    dies_in: str, error: BaseException, state: RunState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.save(state, MODEL)

    def die(*given: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, dies_in, die)
        later = RunState({name: value + 1 for name, value in state.params.items()}, [9, 9, 9], 4, moments=state.moments)
        with pytest.raises(type(error)):
            folder.save(later, MODEL)
    loaded = folder.load()
    assert loaded is not None
    assert_same_run(loaded, state)
    folder.save(later, MODEL)
    assert [path.name for path in folder.checkpoints()] == ["round-000003", "round-000004"]


def test_what_a_killed_process_left_is_no_checkpoint(state: RunState, tmp_path: Path) -> None:
    """kill -9 in the middle of a save: the unfinished folder stays, under its temporary name."""
    folder = RunFolder(tmp_path)
    folder.save(state, MODEL)
    manager = files.new_folder(tmp_path / "checkpoints" / "round-000004")
    making = manager.__enter__()
    (making / "model.safetensors").write_bytes(b"half")
    (making / "state.json").write_text("{")
    assert making.is_dir()
    assert [path.name for path in folder.checkpoints()] == ["round-000003"]
    loaded = folder.load()
    assert loaded is not None
    assert loaded.round == 3


def test_a_write_that_dies_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "job.json"
    files.write_text("old", file)

    def die(*given: object) -> None:
        raise Crash

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(Crash):
        files.write_text("new", file)
    assert file.read_text() == "old"


# The folder


def test_a_folder_that_holds_a_run_is_refused(tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    folder.create(tiny_job())
    before = folder.job_file.read_text()
    with pytest.raises(
        ConfigError, match=rf"{folder.path} already holds a run: resume it with .*--resume {folder.path}"
    ):
        folder.create(tiny_job("seed=1"))
    with pytest.raises(ConfigError, match=r"or choose another folder with dir="):
        folder.create(tiny_job())
    assert folder.job_file.read_text() == before


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: give the folder of a run that was started"):
        RunFolder(tmp_path / "absent").job()


def test_the_job_comes_back(tiny_job: MakeJob, tmp_path: Path) -> None:
    job, folder = tiny_job("train.optimizer_state=client"), RunFolder(tmp_path)
    folder.create(job)
    again = folder.job()
    assert again.to_json() == job.to_json()
    assert again.run_id == job.run_id
    assert again.blueprints(3) == job.blueprints(3)
    assert same(again.initial_state(), job.initial_state())


# Resuming

ROUNDS = 5


def dying(round_: int, worker: int) -> Bend:
    """Every worker up to this one has trained, and kept its state on disk, when the server dies."""

    def bend(task: Task, message: object, answer: Answer) -> list[object]:
        reply = answer()
        if (task.round, task.worker) == (round_, worker):
            raise Crash
        return [reply]

    return bend  # type: ignore[return-value]


def new_run(job: Job, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(job)
    return folder


def go_on(folder: RunFolder, grid: LocalGrid) -> RunState:
    """As a new process would: nothing is left but what is on disk."""
    apps.worker_for.cache_clear()
    return TwistStrategy(folder.job(), folder).run(grid)


def check_events(folder: RunFolder) -> None:
    assert [event["round"] for event in folder.events("round")] == list(range(1, ROUNDS + 1))
    assert [event["round"] for event in folder.events("eval")] == [2, 4, 5]


@pytest.mark.parametrize(("optimizer_state", "every"), [("client", 1), ("server", 2), ("factored", 1)])
def test_a_run_resumed_from_any_checkpoint_ends_the_same(
    optimizer_state: str, every: int, tiny_job: MakeJob, tmp_path: Path
) -> None:
    """It dies in one round or another, at different workers; the log has each round once."""
    overrides = (
        f"train.optimizer_state={optimizer_state}",
        f"train.rounds={ROUNDS}",
        f"checkpoint_every={every}",
        "model.dropout=0.1",
        "eval.every=2",
        "eval.watch_windows=4",
    )
    job = tiny_job(*overrides)
    whole = run(job, start(job), tmp_path / "oracle")
    for dies in range(every, ROUNDS + 1, 2):
        folder = new_run(tiny_job(*overrides), tmp_path / f"dies-in-{dies}")
        with pytest.raises(Crash):
            go_on(folder, LocalGrid(bend=dying(dies, dies % 3)))
        saved = folder.load()
        assert (saved.round if saved else 0) == (dies - 1) // every * every
        assert_same_run(go_on(folder, LocalGrid()), whole)
        check_events(folder)


@pytest.mark.parametrize("optimizer_state", ["reset", "client", "server"])
def test_a_run_may_die_again_and_again(optimizer_state: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    overrides = (
        f"train.optimizer_state={optimizer_state}",
        f"train.rounds={ROUNDS}",
        "checkpoint_every=2",
        "eval.every=2",
        "eval.watch_windows=4",
        "flower.wait_for_nodes=0.05",
    )
    job = tiny_job(*overrides)
    folder = new_run(tiny_job(*overrides), tmp_path / "run")
    for dies in (1, 2, 4, 3, 5):
        with pytest.raises(Crash):
            go_on(folder, LocalGrid(bend=dying(dies, 2)))
    assert_same_run(go_on(folder, LocalGrid(2)), run(job, start(job), tmp_path / "oracle"))
    check_events(folder)


@pytest.mark.parametrize("optimizer_state", ["reset", "server"])
def test_the_older_of_the_two_checkpoints_serves_as_well(
    optimizer_state: str, tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job(f"train.optimizer_state={optimizer_state}", f"train.rounds={ROUNDS}", "checkpoint_every=1")
    folder = new_run(job, tmp_path / "run")
    whole = go_on(folder, LocalGrid())
    newest = folder.checkpoints()[-1]
    assert newest.name == "round-000005"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert_same_run(go_on(folder, LocalGrid()), whole)


def test_a_coverage_debt_survives(tiny_job: MakeJob, tmp_path: Path) -> None:
    """Worker 2 fails in round 2, the server dies in round 3: round 3 is dealt again with the same debt."""
    job = tiny_job("train.rounds=4", "checkpoint_every=1")

    def flaky(task: Task, message: object, answer: Answer) -> list[object]:
        return [failing("away")(message)] if (task.round, task.worker) == (2, 2) else [answer()]  # type: ignore[arg-type]

    def flaky_and_dying(task: Task, message: object, answer: Answer) -> list[object]:
        return (dying(3, 1) if task.round == 3 else flaky)(task, message, answer)  # type: ignore[arg-type,return-value]

    whole = go_on(new_run(job, tmp_path / "whole"), LocalGrid(bend=flaky))  # type: ignore[arg-type]
    folder = new_run(job, tmp_path / "run")
    with pytest.raises(Crash):
        go_on(folder, LocalGrid(bend=flaky_and_dying))  # type: ignore[arg-type]
    saved = folder.load()
    assert saved is not None
    assert saved.debt
    assert saved.cursors == [4, 4, 2]
    assert_same_run(go_on(folder, LocalGrid(bend=flaky)), whole)  # type: ignore[arg-type]
    assert whole.cursors == [8, 8, 6]


def test_a_run_that_failed_goes_on_and_is_done(tiny_job: MakeJob, tmp_path: Path) -> None:
    """The failure of yesterday is not today's: its event is gone from the log when the run goes on."""
    overrides = ("train.rounds=3", "checkpoint_every=1", "eval.max_windows=4", "train.optimizer_state=client")
    job = tiny_job(*overrides)
    folder = new_run(tiny_job(*overrides), tmp_path / "run")

    def away(task: Task, message: object, answer: Answer) -> list[object]:
        return [failing("away")(message)] if task.round == 2 else [answer()]  # type: ignore[arg-type]

    with pytest.raises(NoWorkersError):
        apps.train_run(LocalGrid(bend=away), folder, folder.job())  # type: ignore[arg-type]
    assert [event["error"].split(":")[0] for event in folder.events("failed")] == ["NoWorkersError"]
    assert not folder.results_file.exists()
    assert client_state.moment_folder(folder.job().run_id).is_dir()
    apps.train_run(LocalGrid(bend=honest), folder, folder.job())
    assert folder.events("failed") == []
    assert [event["event"] for event in folder.events()][-1] == "done"
    ended = folder.load()
    assert ended is not None
    assert_same_run(ended, run(job, start(job), tmp_path / "oracle"))
    assert json.loads(folder.results_file.read_text())["rounds"] == 3
    assert not client_state.moment_folder(folder.job().run_id).exists()  # nothing is left on the client


def test_a_finished_run_needs_no_nodes(tiny_job: MakeJob, tmp_path: Path) -> None:
    """Killed while its results were being made: they are made again, from the last checkpoint."""
    folder = new_run(tiny_job("eval.max_windows=4"), tmp_path / "run")
    whole = go_on(folder, LocalGrid())
    apps.train_run(LocalGrid(0), folder, folder.job())
    ended = folder.load()
    assert ended is not None
    assert_same_run(ended, whole)
    assert folder.results_file.is_file()
    assert [event["event"] for event in folder.events()][-1] == "done"


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff", b'{"config": "x', b"[" * 100_000, b"[]", b"{}"])
def test_a_job_that_is_damaged_is_called_so(content: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.job_file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{folder.job_file} is damaged: .*Restore it from a copy of the run$"):
        folder.job()


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff", b"[" * 100_000, b"[]"])
def test_results_that_are_damaged_are_called_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"results\.json is damaged: .*Restore it, or remove it$"):
        files.read_json(tmp_path / "results.json", dict)
