"""What a run has come to is kept: through damage, divergence, lost replies and killed workers; and it says so."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from local_grid import Answer, LocalGrid, assert_same_run, failing

from twist_fl.blueprint.moments import MOMENTS
from twist_fl.federation import apps
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.rounds import run, start, twist_round
from twist_fl.runs.checkpoint import DivergedError, RunFolder
from twist_fl.runs.local import train_local
from twist_fl.runs.resume import go_on
from twist_fl.runs.status import Look
from twist_fl.runs.story import results_text
from twist_fl.system.errors import DamagedError
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker

MakeJob = Callable[..., Job]
LITTLE = ("eval.every=0", "eval.max_windows=2", "eval.tickets=1", "model.dropout=0.1", "flower.wait_for_nodes=0.05")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes all cores; here it takes one, as everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


def begun(job: Job, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(job)
    return folder


def train_until(folder: RunFolder, round_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when this round is in the log, and neither evaluated nor saved."""
    log = RunFolder.log

    def die(self: RunFolder, event: str, **fields: Any) -> None:
        log(self, event, **fields)
        if (event, fields["round"]) == ("round", round_):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", die)
        with pytest.raises(KeyboardInterrupt):
            train_local(folder)


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove_as_told(error: DamagedError) -> None:
    """Type what the message says, but for the last command."""
    told = re.search(r": (rm -r .*) && twist-fl train --resume ", str(error))
    assert told, error
    subprocess.run(told[1], shell=True, check=True)


# Damaged checkpoints


@pytest.mark.parametrize("optimizer_state", ["reset", "client", "server"])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    optimizer_state: str, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same weights: clients keep their state as long as a checkpoint that needs it is kept."""
    job = tiny_job(*LITTLE, f"train.optimizer_state={optimizer_state}", "train.rounds=5", "checkpoint_every=2")
    folder = begun(job, tmp_path / "my run")
    train_until(folder, 5, monkeypatch)
    spoil(folder.checkpoints()[-1] / "model.safetensors")
    with pytest.raises(DamagedError, match=r"round-000004/model\.safetensors is not .* round 2 is whole") as caught:
        go_on(folder)
    remove_as_told(caught.value)
    assert go_on(folder).round == 2
    train_local(folder)
    ended = folder.load()
    assert ended is not None
    assert_same_run(ended, run(job, start(job), tmp_path / "oracle"))
    assert all(not event["notes"] for event in folder.events("round"))


def test_a_run_that_goes_on_reads_each_byte_of_its_checkpoint_once_to_check_it(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tiny_job(*LITTLE, "train.rounds=2", "checkpoint_every=1"), tmp_path / "run")
    train_until(folder, 2, monkeypatch)
    checked: list[Path] = []
    monkeypatch.setattr("twist_fl.runs.checkpoint.check_seal", checked.append)
    go_on(folder)
    assert folder.load() is not None
    assert checked == folder.checkpoints()


def test_a_run_of_which_no_checkpoint_is_whole_begins_again(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(*LITTLE, "train.rounds=3", "checkpoint_every=1")
    folder = begun(job, tmp_path / "run")
    train_until(folder, 3, monkeypatch)
    for checkpoint in folder.checkpoints():
        (checkpoint / "state.json").unlink()
    with pytest.raises(DamagedError, match=r"No other is whole\. To begin again with round 1: rm -r") as caught:
        go_on(folder)
    remove_as_told(caught.value)
    assert go_on(folder).round == 0


def test_a_checkpoint_under_the_name_of_another_round_is_refused(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tiny_job(*LITTLE, "train.rounds=3", "checkpoint_every=1"), tmp_path / "run")
    train_until(folder, 3, monkeypatch)
    newest = folder.checkpoints()[-1]
    newest.rename(newest.with_name("round-000003"))
    with pytest.raises(DamagedError, match=r"round-000003 is a checkpoint of round 2, .* round 1 is whole"):
        folder.load()


def test_copies_beside_checkpoints_are_none(tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tiny_job(*LITTLE, "train.rounds=2", "checkpoint_every=1"), tmp_path / "run")
    train_until(folder, 2, monkeypatch)
    for name in ("round-000001.bak", "round-000009 (copy)", "round-old"):
        (folder.path / "checkpoints" / name).mkdir()
    assert folder.saved_rounds == [1]
    look = Look(folder.path)
    look.again()
    assert "round 1 is saved" in look.state()
    found = folder.load()
    assert found is not None
    assert found.round == 1


# Divergence


@pytest.mark.parametrize("where", ["params", "moments", "outer"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_not_saved(where: str, value: float, tiny_job: MakeJob, tmp_path: Path) -> None:
    job, folder = tiny_job("train.optimizer_state=server", "aggregate.optimizer=adam"), RunFolder(tmp_path / "my run")
    state = start(job)
    assert state.moments is not None
    assert state.outer is not None
    state.round = 4
    folder.save(state, job.model_config)
    state.round = 6
    moments, outer = state.moments.values["exp_avg"], state.outer.values["exp_avg"]
    states = {"params": state.params, "moments": moments, "outer": outer}
    states[where]["transformer.ln_f.weight"][-1] = value
    with pytest.raises(DivergedError) as caught:
        folder.save(state, job.model_config)
    told, path = str(caught.value), f"'{folder.path}'"
    assert re.match(r"training has diverged: (exp_avg/)?transformer\.ln_f\.weight has values that are not finite", told)
    assert " after round 6, which is not saved. Round 4 is saved. Begin another run there with smaller steps: " in told
    assert f"twist-fl train model.pretrained={path} train.lr=... (to go on" in told
    assert told.endswith(f"to the same end: twist-fl train --resume {path})")
    assert folder.saved_rounds == [4]
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["round-000004"]


def test_a_run_that_diverges_on_the_server_ends_and_says_so(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(*LITTLE, "aggregate.optimizer=momentum", "aggregate.server_lr=1e300", "checkpoint_every=1")
    folder = begun(job, tmp_path / "run")
    with pytest.raises(DivergedError, match=r"after round 1, which is not saved\. Nothing is saved: begin another"):
        train_local(folder)
    (failed,) = folder.events("failed")
    assert failed["error"].startswith("DivergedError: training has diverged")
    assert folder.saved_rounds == []
    assert not folder.results_file.exists()


# Lost replies


def losing(*lost: tuple[int, int]) -> Callable[..., Any]:
    """The pairs (round, worker) do not answer."""

    def bend(task: Task, message: Any, answer: Answer) -> list[Any]:
        return [failing("away")(message)] if (task.round, task.worker) in lost else [answer()]

    return bend


@pytest.mark.parametrize(
    ("lost", "words"),
    [((), ""), (((2, 1),), "; 1 reply was lost"), (((1, 0), (2, 1)), "; 2 replies were lost")],
)
def test_a_run_says_how_many_replies_were_lost(
    lost: tuple[tuple[int, int], ...], words: str, tiny_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tiny_job(*LITTLE), tmp_path / "run")
    apps.train_run(LocalGrid(bend=losing(*lost)), folder, folder.job())
    results = json.loads(folder.results_file.read_text())
    assert results["lost_replies"] == len(lost)
    (event,) = folder.events("results")
    assert results_text(results) == results_text(event)
    assert results_text(results).partition("%")[0].endswith(words)
    assert ("lost" in results_text(results)) == bool(lost)
    assert results_text(results) in capsys.readouterr().out.splitlines()
    look = Look(folder.path)
    look.again()
    assert (words.removeprefix("; ") in "\n".join(look.details())) and ("lost" in look.line()) == bool(lost)


def test_a_round_whose_replies_are_all_lost_keeps_those_before_and_says_from_where_to_go_on(
    tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job(*LITTLE, "train.rounds=4", "checkpoint_every=9", "train.optimizer_state=client")
    folder = begun(job, tmp_path / "my run")
    away = losing(*((3, worker) for worker in range(3)))
    way = rf"round 2 is saved; go on after it with: twist-fl train --resume '{folder.path}' "
    with pytest.raises(NoWorkersError, match=rf"^round 3: no worker answered: .*ValueError: away.*; {way}"):
        apps.train_run(LocalGrid(bend=away), folder, folder.job())
    with pytest.raises(NoWorkersError, match=rf"^no node is ready for the run: none connected .*; {way}"):
        apps.train_run(LocalGrid(0), folder, folder.job())
    apps.train_run(LocalGrid(), folder, folder.job())
    ended = folder.load()
    assert ended is not None
    assert_same_run(ended, run(job, start(job), tmp_path / "oracle"))


class Leaving(LocalGrid):
    """Nodes that are gone after round 2."""

    def get_node_ids(self) -> Iterable[int]:
        return [] if any(served.task.round == 2 for served in self.served) else super().get_node_ids()


def test_nodes_that_go_away_cost_no_round(tiny_job: MakeJob, tmp_path: Path) -> None:
    """A reply is lost, so they are looked for again, and none is there: the round that was trained is kept."""
    folder = begun(tiny_job(*LITTLE, "train.rounds=4", "checkpoint_every=9"), tmp_path / "run")
    with pytest.raises(NoWorkersError, match=r"^no node is ready .*; round 2 is saved; go on after it with: "):
        apps.train_run(Leaving(bend=losing((2, 1))), folder, folder.job())
    assert folder.saved_rounds == [2]


# What clients keep


def kept(shelf: MomentShelf, round_: int) -> None:
    values = {name: {"a": torch.full((2,), float(round_))} for name in MOMENTS}
    shelf.save(0, round_, Moments(round_, values), ["a"], keep_from=0)


def test_what_a_killed_worker_had_half_written_is_removed_when_it_is_asked_again(tmp_path: Path) -> None:
    shelf = MomentShelf(tmp_path)
    kept(shelf, 1)
    for name in (".worker-0-round-2.4242", ".worker-1-round-2.4242"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "moments.safetensors").write_bytes(b"half")
    found = shelf.load(0, 2)
    assert found is not None
    assert found.step == 1
    # Another worker may be at work on the other.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".worker-1-round-2.4242", "worker-0-round-1"]


@pytest.mark.parametrize("file", ["moments.safetensors", "SHA256SUMS"])
def test_a_client_does_not_use_a_state_that_is_damaged_and_says_so(
    file: str, tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job("train.optimizer_state=client", "train.rounds=2")
    ends = {}
    for harm in ("damaged", "not there"):
        worker = Worker(job, MomentShelf(tmp_path / harm))
        state, _ = twist_round(job, start(job), [worker] * 3)
        folder = tmp_path / harm / "worker-1-round-1"
        if harm == "damaged":
            spoil(folder / file)
        else:
            folder.rename(tmp_path / "elsewhere")
        ends[harm] = twist_round(job, state, [worker] * 3)
    assert ends["damaged"][1].notes == {1: "its optimiser state on this machine is damaged: started anew"}
    assert ends["not there"][1].notes == {1: "its optimiser state is not on this machine: started anew"}
    assert_same_run(ends["damaged"][0], ends["not there"][0])
