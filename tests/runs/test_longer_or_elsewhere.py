"""A run that goes on: longer, elsewhere, with or without Flower; and what would make it another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import write_text
from local_grid import LocalGrid, assert_same_run

from twist_fl.federation import apps
from twist_fl.rounds import RunState, run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.local import train_local
from twist_fl.runs.resume import at_places, go_on
from twist_fl.system.errors import ConfigError
from twist_fl.training.client_state import moment_folder
from twist_fl.training.job import Job, job_from_json

MakeJob = Callable[..., Job]
SHORT_LAST = ("train.batch_size=64", "train.interval=3")
"""An epoch of four batches: the last of its two intervals is shorter."""
LITTLE = ("eval.every=0", "eval.max_windows=2", "eval.tickets=1", "model.dropout=0.1", "checkpoint_every=3")


def begun(job: Job, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(job)
    return folder


def trained(job: Job, path: Path) -> RunFolder:
    folder = begun(job, path)
    train_local(folder)
    return folder


def state_of(folder: RunFolder) -> RunState:
    state = folder.load()
    assert state is not None
    return state


# Longer


@pytest.mark.parametrize(
    "setting",
    [
        *("train.optimizer_state=client", "train.optimizer_state=factored", "algorithm=ddp"),
        *("blueprint.assign=shuffled", "aggregate.optimizer=adam"),
    ],
)
def test_five_rounds_and_then_two_are_seven(setting: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    overrides = (*LITTLE, setting)
    whole = tiny_job(*overrides, "train.rounds=7")
    folder = trained(tiny_job(*overrides, "train.rounds=5"), tmp_path / "run")
    run_id = folder.job().run_id
    first = json.loads(folder.results_file.read_text())
    continued = go_on(folder, ["train.rounds=7"])
    assert (continued.finished, continued.note) == (False, "")
    assert json.loads(folder.results_file.read_text()) == first  # until there are others
    train_local(folder)
    assert_same_run(state_of(folder), run(whole, start(whole), tmp_path / "oracle"))
    job = folder.job()
    assert (job.config.train.rounds, job.run_id) == (7, run_id)
    assert [event["round"] for event in folder.events("round")] == list(range(1, whole.num_rounds + 1))
    assert [event["round"] for event in folder.events("done")] == [whole.num_rounds]
    assert json.loads(folder.results_file.read_text())["rounds"] == whole.num_rounds
    assert folder.finished(whole.num_rounds)
    assert not moment_folder(run_id).exists()
    assert go_on(folder).finished


@pytest.mark.parametrize("state", ["reset", "client", "server"])
def test_a_shorter_last_interval_is_trained_again_whole(state: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    """An epoch is no whole number of intervals: its last is shorter, and a run of two epochs has it whole."""
    overrides = (*LITTLE, f"train.optimizer_state={state}", *SHORT_LAST, "checkpoint_every=99")
    once, twice = (tiny_job(*overrides, f"train.epochs={epochs}") for epochs in (1, 2))
    assert (once.ends_short, once.num_rounds) == (True, 2)
    folder = trained(once, tmp_path / "run")
    assert folder.saved_rounds == [once.num_rounds - 1, once.num_rounds]
    continued = go_on(folder, ["train.epochs=2"])
    assert (continued.round, continued.note) == (once.num_rounds - 1, "")
    train_local(folder)
    assert_same_run(state_of(folder), run(twice, start(twice), tmp_path / "oracle"))


def test_a_longer_run_that_cannot_be_the_same_says_so(tiny_job: MakeJob, tmp_path: Path) -> None:
    once = tiny_job(*LITTLE, *SHORT_LAST, "train.epochs=1")
    folder = trained(once, tmp_path / "run")
    folder.remove(folder.checkpoints()[0])  # as runs of before have none
    continued = go_on(folder, ["train.epochs=2"])
    assert continued.round == once.num_rounds
    assert f"round {once.num_rounds} was trained as the run's last and is shorter than the others" in continued.note


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        ("train.schedule=cosine", False),
        ("train.schedule=linear", False),
        ("train.warmup=0.5", False),
        ("train.schedule=constant", True),
    ],
)
def test_a_schedule_over_the_whole_run_is_another_in_a_longer_run(
    setting: str, same: bool, tiny_job: MakeJob, tmp_path: Path
) -> None:
    folder = trained(tiny_job(*LITTLE, setting, "train.rounds=4"), tmp_path / "run")
    note = go_on(folder, ["train.rounds=8"]).note
    assert (note == "") == same
    if not same:
        assert setting.split("=", maxsplit=1)[0] in note
        assert "the 4 rounds so far were trained by those of 4 rounds: the run is not the same as one of 8" in note


def test_a_schedule_that_has_not_begun_to_fall_is_the_same(tiny_job: MakeJob, tmp_path: Path) -> None:
    """Three of five rounds are trained when the run becomes longer; the rate falls in the fifth."""
    overrides = (*LITTLE, "train.schedule=wsd", "train.decay=0.2")
    whole = tiny_job(*overrides, "train.rounds=10")
    folder = begun(tiny_job(*overrides, "train.rounds=5"), tmp_path / "run")
    job = folder.job()
    folder.save(run(job, start(job), tmp_path / "first", 3), job.model_config, job.corpus.tokenizer_folder)
    assert go_on(folder, ["train.rounds=10"]).note == ""
    train_local(folder)
    assert_same_run(state_of(folder), run(whole, start(whole), tmp_path / "oracle"))


def test_a_budget_that_is_spent_is_refused(tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = trained(tiny_job(*LITTLE, "train.rounds=4"), tmp_path / "run")
    before = folder.job_file.read_text()
    with pytest.raises(ConfigError, match=r"^train\.rounds=3 is 3 rounds, and 4 rounds are trained: give more$"):
        go_on(folder, ["train.rounds=3"])
    assert folder.job_file.read_text() == before
    folder = trained(tiny_job(*LITTLE, "algorithm=ddp", "train.rounds=4"), tmp_path / "ddp")
    with pytest.raises(ConfigError, match=r"=3 is 6 rounds, and 8 rounds \(4 intervals\) are trained: give more$"):
        go_on(folder, ["train.rounds=3"])


def test_a_finished_run_is_evaluated_again_where_its_evaluation_changes(tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = trained(tiny_job(*LITTLE), tmp_path / "run")
    before = state_of(folder)
    assert not go_on(folder, ["eval.tickets=3", "eval.sizes=3,1"]).finished
    train_local(folder)
    tickets = json.loads(folder.results_file.read_text())["tickets"]
    assert [(each["size"], len(each["perplexities"])) for each in tickets] == [(3, 3), (1, 3)]
    assert_same_run(state_of(folder), before)


def test_a_name_changes_nothing_else(tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = trained(tiny_job(*LITTLE), tmp_path / "run")
    assert go_on(folder, ["name=other", "train.threads=2", "flower.round_timeout=9"]).finished
    config = folder.job().config
    assert (config.name, config.train.threads, config.flower.round_timeout) == ("other", 2, 9)


@pytest.mark.parametrize(
    "setting",
    ["seed=1", "algorithm=fedavg", "train.lr=1", "train.interval=3", "train.workers=2", "data.window=8",
     "model.n_layer=6", "blueprint.num_sub=3", "train.precision=bfloat16", "dir=elsewhere"],
)  # fmt: skip
def test_what_would_make_it_another_run_is_refused_by_name(setting: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = begun(tiny_job(*LITTLE), tmp_path / "run")
    before = folder.job_file.read_text()
    key = setting.partition("=")[0]
    reason = rf"^{key}=.* would make it another run: this one has .*train\.rounds, train\.epochs"
    with pytest.raises(ConfigError, match=reason):
        go_on(folder, [setting, "train.rounds=9"])
    assert folder.job_file.read_text() == before


def test_nothing_changes_while_a_server_is_at_work(tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = begun(tiny_job(*LITTLE), tmp_path / "run")
    with folder.lock("server"), pytest.raises(ConfigError, match=r"another server.* is at work in"):
        go_on(folder, ["train.rounds=9"])
    assert folder.job().config.train.rounds == 2


def test_flwr_run_trains_longer_as_well(tiny_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run begun without Flower goes on with it; `overrides` of an existing run-dir are those of --resume."""
    whole = tiny_job(*LITTLE, "train.optimizer_state=client", "train.rounds=5")
    folder = trained(tiny_job(*LITTLE, "train.optimizer_state=client", "train.rounds=3"), tmp_path / "run")
    apps.train_run(LocalGrid(), *apps.open_run(str(folder.path), "", ""))
    assert f"{folder.path} is finished" in capsys.readouterr().out
    apps.train_run(LocalGrid(), *apps.open_run(str(folder.path), "", "train.rounds=5"))
    assert_same_run(state_of(folder), run(whole, start(whole), tmp_path / "oracle"))
    with pytest.raises(ConfigError, match="seed=1 would make it another run"):
        apps.open_run(str(folder.path), "", "seed=1")


# Elsewhere


@contextmanager
def another_machine(tmp_path: Path) -> Iterator[None]:
    """Its cache knows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWIST_FL_CACHE", str(tmp_path / "another-cache"))
        apps.worker_for.cache_clear()
        yield


@pytest.fixture
def moved(tiny_job: MakeJob, tmp_path: Path, text_folder: Path) -> Iterator[tuple[RunFolder, Path]]:
    """A trained run in a renamed folder on another machine, and the new place of its text, gone from the old."""
    old, new = tmp_path / "text", tmp_path / "here is the text"
    shutil.copytree(text_folder, old)
    folder = trained(tiny_job(*LITTLE, f"data.path={old}", "train.rounds=3"), tmp_path / "run")
    old.rename(new)
    folder.path.rename(tmp_path / "a run")
    with another_machine(tmp_path):
        yield RunFolder(tmp_path / "a run"), new


def test_a_run_goes_on_where_its_text_is_elsewhere(
    moved: tuple[RunFolder, Path], tiny_job: MakeJob, tmp_path: Path
) -> None:
    folder, new = moved
    reason = r"the run's text is not in this machine's cache, and data\.path=.*text' does not exist.*data\.path=\.\.\."
    with pytest.raises(ConfigError, match=reason):
        folder.job().text.open()
    assert not go_on(folder, [f"data.path={new}", "train.rounds=5"]).finished
    assert folder.job().config.data.path == str(new)
    train_local(folder)
    whole = tiny_job(*LITTLE, f"data.path={new}", "train.rounds=5")
    assert_same_run(state_of(folder), run(whole, start(whole), tmp_path / "oracle"))


def test_other_text_is_refused(moved: tuple[RunFolder, Path], tmp_path: Path) -> None:
    folder, new = moved
    write_text(new / "train.txt", 6000, seed=3)
    before = folder.job_file.read_text()
    with pytest.raises(ConfigError, match=r"the text or the tokenizer here is not the run's \(hash .*, expected "):
        go_on(folder, [f"data.path={new}", "train.rounds=5"])
    with pytest.raises(ConfigError, match=r"the text or the tokenizer here is not the run's"):
        at_places(folder.job(), [f"data.path={new}"])
    assert folder.job_file.read_text() == before


def test_who_looks_at_a_run_may_say_where_its_text_is_and_nothing_else(moved: tuple[RunFolder, Path]) -> None:
    folder, new = moved
    job = at_places(folder.job(), [f"data.path={new}"])
    assert len(job.corpus.test) > 0
    assert folder.job().config.data.path != str(new)  # it only looked
    assert folder.job().corpus.digest == job.corpus.digest  # in the cache now
    with pytest.raises(ConfigError, match=r"eval\.tickets=9 would make it another run.*What may change: data\.path, "):
        at_places(job, ["eval.tickets=9"])


def test_what_needs_no_text_never_looks_for_it(moved: tuple[RunFolder, Path]) -> None:
    """A job's rounds, shards' sizes, layout and models need none, and a job of its JSON is the same."""
    folder, _ = moved
    job, state = folder.job(), state_of(folder)
    assert (job.num_rounds, job.shard(0).size, state.round) == (3, job.text.num_windows // 3, 3)
    assert job.models() is not None
    assert job_from_json(job.to_json()).to_json() == job.to_json()


def test_a_pretrained_model_moves_with_its_tokenizer(tiny_job: MakeJob, tmp_path: Path, text_folder: Path) -> None:
    first = trained(tiny_job(*LITTLE), tmp_path / "first")
    old, new = tmp_path / "model", tmp_path / "moved"
    shutil.copytree(first.checkpoints()[-1], old)
    folder = begun(tiny_job(*LITTLE, f"model.pretrained={old}"), tmp_path / "run")
    expected = folder.job().initial_state()
    old.rename(new)
    with another_machine(tmp_path):
        with pytest.raises(ConfigError, match=r"the run's text is not in this machine's cache"):
            folder.job().text.open()
        go_on(folder, [f"model.pretrained={new}"])
        job = folder.job()
        assert job.config.data.tokenizer == job.config.model.pretrained == str(new)
        assert job.corpus.digest in folder.job_file.read_text()
        assert all((value == expected[name]).all() for name, value in job.initial_state().items())


def test_a_model_of_other_sizes_is_another(tiny_job: MakeJob, tmp_path: Path) -> None:
    small, large = (
        trained(tiny_job(*LITTLE, f"model.n_embd={size}", "train.rounds=1"), tmp_path / str(size)) for size in (32, 64)
    )
    folder = begun(tiny_job(*LITTLE, f"model.pretrained={small.path}"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^model\.pretrained='.*' has other sizes than the run's model$"):
        go_on(folder, [f"model.pretrained={large.path}"])


def test_files_of_a_run_have_one_mode(tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = trained(tiny_job(*LITTLE, "train.optimizer_state=client"), tmp_path / "run")
    assert folder.moments_folder.is_dir()
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.stat().st_mode for path in folder.path.rglob("*") if path.is_file()}
    assert modes == {plain.stat().st_mode}
