"""Each worker's own text: who trains on what, what is said of it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_text
from local_grid import LocalGrid, assert_same_run

from twist_fl.data.corpus import load_corpus
from twist_fl.data.own_text import known_facts
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.rounds import run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.local import train_local
from twist_fl.runs.resume import go_on
from twist_fl.system.errors import ConfigError
from twist_fl.training.job import Job, job_from_json

MakeJob = Callable[..., Job]
WORDS = (300, 900, 1500)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders and a file, of different lengths."""
    folder = tmp_path_factory.mktemp("clients")
    for place, words in enumerate(WORDS[:2]):
        (folder / f"client-{place}").mkdir()
        write_text(folder / f"client-{place}" / "a.txt", words, seed=10 + place)
    write_text(folder / "client-2.txt", WORDS[2], seed=12)
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture
def private_job(tiny_job: MakeJob, clients: Path) -> MakeJob:
    return lambda *overrides: tiny_job(f"data.private={clients}", *overrides)


def test_each_worker_trains_on_its_own_text_alone(private_job: MakeJob, clients: Path) -> None:
    job = private_job()
    sizes = [job.shard(worker).size for worker in range(3)]
    assert sizes == sorted(set(sizes))
    assert len({job.text_of(worker).digest for worker in range(3)} | {job.text.digest}) == 4
    for worker, name in enumerate(("client-0", "client-1", "client-2.txt")):
        config = job.config.data
        own = type(config)(
            source="files", path=str(clients / name), window=config.window, tokenizer=str(job.corpus.tokenizer_folder)
        )
        assert np.array_equal(job.windows(worker), load_corpus(own).train)
        shard = job.shard(worker)
        epoch = np.concatenate([shard.batch(cursor) for cursor in range(shard.batches_per_epoch)])
        assert sorted(epoch) == list(range(shard.size))


def test_epochs_are_those_of_the_longest_shard(private_job: MakeJob) -> None:
    job = private_job("train.epochs=2")
    longest = job.shard(2).batches_per_epoch
    assert job.total_batches == 2 * longest > 2 * job.shard(0).batches_per_epoch


@pytest.mark.parametrize("settings", [(), ("train.weighting=tokens", "train.variant=hybrid")])
def test_local_flower_and_rounds_give_the_same_weights(
    private_job: MakeJob, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    # The shortest shard begins again.
    job = private_job("eval.max_windows=4", "train.rounds=4", "train.batch_size=10", *settings)
    expected = run(job, start(job), tmp_path)
    assert min(expected.cursors) > job.shard(0).batches_per_epoch
    local, flower = RunFolder(tmp_path / "local"), RunFolder(tmp_path / "flower")
    local.create(job)
    train_local(local)
    ended = local.load()
    assert ended is not None
    assert_same_run(ended, expected)
    flower.create(job)
    assert_same_run(TwistStrategy(flower.job(), flower).run(LocalGrid(len(job.clients))), expected)


def test_a_run_goes_on_where_the_texts_lie_now_and_on_no_others(
    private_job: MakeJob, tmp_path: Path, clients: Path
) -> None:
    folder, moved = RunFolder(tmp_path / "run"), tmp_path / "moved"
    folder.create(private_job())
    moved.symlink_to(clients)
    job = go_on(folder, [f"data.private={moved}"]).job
    assert [job.shard(worker) for worker in range(3)] == [folder.job().shard(worker) for worker in range(3)]
    other = tmp_path / "other"
    other.mkdir()
    for place in range(3):
        write_text(other / f"{place}.txt", 400, seed=place)
    with pytest.raises(ConfigError, match=r"worker 0's text or its tokenizer is not what the run began with"):
        go_on(folder, [f"data.private={other}"])
    with pytest.raises(ConfigError, match=r"data\.private=None would make it another run"):
        go_on(folder, ["data.private=null"])


def test_workers_evaluate_on_their_own_held_out_windows(private_job: MakeJob, tmp_path: Path) -> None:
    job = private_job("eval.federated=full", "eval.every=1", "eval.watch_windows=900", "train.rounds=1")
    folder = RunFolder(tmp_path / "run")
    folder.create(job)
    TwistStrategy(job, folder).run(LocalGrid(3))
    (event,) = folder.events("federated")
    tests = [min(job.text_of(worker).num_test, 900) for worker in range(3)]
    assert len(set(tests)) > 1
    assert event["answered"] == [0, 1, 2]
    assert event["num_tokens"] == sum(tests) * 15


def test_a_folder_of_other_number_and_a_text_of_less_than_a_batch_are_refused(
    private_job: MakeJob, tmp_path: Path, clients: Path
) -> None:
    with pytest.raises(ConfigError, match=r"holds 3 files and folders, and train\.workers=2: one of them is each"):
        private_job("train.workers=2")
    with pytest.raises(ConfigError, match=r"data\.private='.*client-2\.txt' is a file: give a folder"):
        private_job(f"data.private={clients / 'client-2.txt'}")
    with pytest.raises(ConfigError, match=r"does not exist, did you mean '.*clients0'"):
        private_job(f"data.private={clients}x")
    with pytest.raises(ConfigError, match=r"worker 0 has \d+ windows of data\.window=16 tokens .*batch_size=200: give"):
        private_job("train.batch_size=200")
    folder = tmp_path / "empty"
    for name in "abc":
        (folder / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"worker 0: data\.path='.*/a' holds no text"):
        private_job(f"data.private={folder}")


def test_a_job_keeps_what_is_known_and_refuses_what_is_not(private_job: MakeJob) -> None:
    job = private_job()
    again = job_from_json(job.to_json())
    assert again.to_json() == job.to_json()
    wrong: list[object] = [{}, [], [["a", 1, 1]] * 2, [["a", 1]] * 3, [["../a", 1, 1]] * 3, [["a", -1, 1]] * 3]
    for rows in wrong:
        with pytest.raises(ValueError, match="own"):
            known_facts(rows, 3)
