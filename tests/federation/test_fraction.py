"""train.fraction: a pool of workers larger than those of a round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_grid import LocalGrid, assert_same_run

from twist_fl.federation.strategy import TwistStrategy
from twist_fl.rounds import plan, run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.story import held_text
from twist_fl.system.errors import ConfigError
from twist_fl.training.interval import train_interval
from twist_fl.training.job import Job
from twist_fl.training.schedule import learning_rate

MakeJob = Callable[..., Job]
POOL = ("train.workers=5", "train.fraction=0.5", "train.rounds=4", "blueprint.num_sub=2")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


@pytest.mark.parametrize(
    "settings",
    [
        ("train.optimizer_state=server", "train.schedule=linear"),
        ("train.optimizer_state=client", "blueprint.num_sub=[1,3,3,3,3]"),
        ("train.optimizer_state=client", "blueprint.num_sub=[2,4]", "blueprint.assign=drawn"),
        ("blueprint.num_sub=[2,3,3,3,4]", "blueprint.assign=shuffled", "train.variant=hybrid"),
        ("algorithm=fedavg", "train.weighting=tokens"),
        ("algorithm=ddp", "train.batch_size=1"),
    ],
    ids=["server's moments", "clients' moments", "drawn", "hybrid, shuffled", "fedavg", "ddp"],
)
def test_the_app_is_rounds_run_of_those_that_are_drawn(
    settings: tuple[str, ...], tiny_job: MakeJob, tmp_path: Path
) -> None:
    # Three nodes serve five workers, and nobody waits for two more.
    job = tiny_job("model.dropout=0.1", "eval.every=0", "flower.wait_for_nodes=0.1", *POOL, *settings)
    folder, grid = RunFolder(tmp_path / "run"), LocalGrid(3)
    folder.create(job)
    strategy = TwistStrategy(job, folder)
    ours = strategy.run(grid)
    assert_same_run(ours, run(job, start(job), tmp_path / "oracle"))
    rounds = range(1, job.num_rounds + 1)
    assert [event["answered"] for event in folder.events("round")] == [job.sampled(round_) for round_ in rounds]
    asked = {(served.task.round, served.task.worker) for served in grid.served}
    assert asked == {(round_, each) for round_ in rounds for each in job.sampled(round_) if each in job.clients}
    times = [sum(each in job.sampled(round_) for round_ in rounds) for each in range(5)]
    assert ours.cursors == [number * job.batches_per_round for number in times]


def test_who_is_drawn_is_a_function_of_seed_and_round(tiny_job: MakeJob) -> None:
    job, same, other = tiny_job(*POOL), tiny_job(*POOL), tiny_job(*POOL, "seed=1")
    drawn = [job.sampled(round_) for round_ in range(1, 201)]
    assert drawn == [same.sampled(round_) for round_ in range(1, 201)]
    assert drawn != [other.sampled(round_) for round_ in range(1, 201)]
    assert all(len(set(workers)) == 2 and workers == sorted(workers) for workers in drawn)
    for each in range(5):  # 80 of 200 in expectation, with a deviation of 7
        assert 50 < sum(each in workers for workers in drawn) < 110
    assert tiny_job().sampled(7) == [0, 1, 2]


def test_the_hybrid_server_is_always_in(tiny_job: MakeJob) -> None:
    job = tiny_job(*POOL, "train.variant=hybrid", "train.fraction=0.01")
    drawn = [job.sampled(round_) for round_ in range(1, 41)]
    assert all(len(workers) == 2 and workers[0] == 0 for workers in drawn)
    assert {workers[1] for workers in drawn} == {1, 2, 3, 4}


def test_the_sampled_cover_all_blocks(tiny_job: MakeJob) -> None:
    """Whoever they are: the fewest places that a round may have are checked, and the smallest legal size is named."""
    with pytest.raises(
        ConfigError,
        match=r"^train\.fraction=0\.5 of 6 workers: .* 3 workers .* cover all 4 blocks; .* N_sub for all is 2$",
    ):
        tiny_job("train.workers=6", "train.fraction=0.5", "blueprint.num_sub=1")  # all six would
    with pytest.raises(ConfigError, match=r"^train\.fraction=0\.5 of 4 workers"):
        tiny_job("train.workers=4", "train.fraction=0.5", "blueprint.num_sub=[1,1,4,4]")
    always = tiny_job("train.workers=4", "train.fraction=0.5", "blueprint.num_sub=[3,1,1,4]", "train.variant=hybrid")
    for round_ in range(1, 30):
        for kind in ("attn", "ffn"):
            held = {block for blueprint in always.blueprints(round_) for block in blueprint.held(kind, 1)}
            assert held == {0, 1, 2, 3}


def test_the_learning_rate_is_of_the_round_whoever_was_drawn(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(*POOL, "train.schedule=linear")
    seen: list[list[float]] = []

    def heard(model: Any, batches: Any, config: Any, seed: int, moments: Any, rates: Any, soft: Any) -> Any:
        seen.append(list(rates))
        return train_interval(model, batches, config, seed, moments, seen[-1], soft)

    monkeypatch.setattr("twist_fl.training.worker.train_interval", heard)
    state = run(job, start(job), tmp_path)
    assert len(set(state.cursors)) > 1  # some have missed more rounds than others
    assert seen == [[learning_rate(job.config.train, 2 * r + i, 8) for i in range(2)] for r in range(4) for _ in "ab"]


def test_what_is_said_of_the_workers(tiny_job: MakeJob) -> None:
    job = tiny_job(*POOL)
    sizes = [job.layout.num_params(task.blueprint) for task in plan(job, start(job))]
    event = {"subnet_params": sizes, "num_params": job.layout.num_params(), "workers": 5}
    assert held_text(event).startswith("each worker (of 2 a round, drawn from 5) trains ")
