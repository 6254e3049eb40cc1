"""DDP as a Flower strategy: one Adam step on the mean gradient of the workers' batches (spec, section 9)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from local_grid import Answer, LocalGrid, assert_same_run, failing, same
from transformers import AutoModelForCausalLM

from twist_fl.blueprint.cost import round_bytes
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.blueprint.moments import MOMENTS
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.subnet import State, get_state, load_state
from twist_fl.rounds import RoundMean, RunState, dispatch, plan, run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import next_token_loss
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker

MakeJob = Callable[..., Job]
DDP = ("algorithm=ddp", "model.dropout=0.1", "flower.wait_for_nodes=0.05", "eval.every=0")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes all cores; here it takes one, as everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


def strategy_of(job: Job, folder: Path) -> TwistStrategy:
    kept = RunFolder(folder)
    kept.create(job)
    return TwistStrategy(job, kept)


def seed_of(job: Job, step: int, worker: int) -> int:
    return int(np.random.SeedSequence((job.config.seed, step, worker)).generate_state(1)[0])


def batch_of(job: Job, cursor: int, worker: int) -> torch.Tensor:
    return torch.tensor(job.corpus.train[job.shard(worker).batch(cursor)], dtype=torch.int64)


def by_hand(job: Job, steps: int) -> State:
    """A loop over workers that any textbook has: mean gradient, one Adam."""
    model = AutoModelForCausalLM.from_config(job.model_config)  # type: ignore[no-untyped-call]
    load_state(model, job.initial_state())
    model.train()
    train = job.config.train
    optimizer = torch.optim.Adam(
        model.parameters(), lr=train.lr, eps=train.eps, weight_decay=train.weight_decay, fused=True
    )
    for step in range(1, steps + 1):
        gradients: list[State] = []
        for worker in range(train.workers):
            torch.manual_seed(seed_of(job, step, worker))
            model.zero_grad()
            next_token_loss(model, batch_of(job, step - 1, worker)).backward()  # type: ignore[no-untyped-call]
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        for name, parameter in model.named_parameters():
            mean = sum(one[name].double() for one in gradients) / len(gradients)
            parameter.grad = mean.float()  # type: ignore[union-attr]
        optimizer.step()
    return get_state(model)


@pytest.mark.parametrize("overrides", [(), ("train.weight_decay=0.1", "train.optimizer_state=client")])
def test_against_the_textbook_bit_for_bit(overrides: tuple[str, ...], tiny_job: MakeJob, tmp_path: Path) -> None:
    """With dropout. `train.rounds=2` of two batches each are four steps; where worker moments stay does not matter."""
    job = tiny_job(*DDP, *overrides)
    assert (job.num_rounds, job.total_batches) == (4, 4)
    ours = run(job, start(job), tmp_path)
    assert same(ours.params, by_hand(job, 4))
    assert not same(ours.params, job.initial_state())
    assert not list(tmp_path.iterdir())  # no client keeps anything


def test_against_torchs_distributed_data_parallel(tiny_job: MakeJob, tmp_path: Path) -> None:
    """20 steps of two processes that talk by gloo: within 1e-6, through the Flower app."""
    steps = 20
    job = tiny_job(*DDP, "train.workers=2", "train.rounds=10", "train.lr=1e-3")
    task = {
        "config": job.model_config.to_diff_dict(),
        "params": job.initial_state(),
        "lr": job.config.train.lr,
        "seeds": [[seed_of(job, step, worker) for step in range(1, steps + 1)] for worker in range(2)],
        "batches": [[batch_of(job, cursor, worker) for cursor in range(steps)] for worker in range(2)],
    }
    torch.save(task, tmp_path / "task.pt")
    script = Path(__file__).parents[1] / "torch_ddp.py"
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        ours = strategy_of(job, tmp_path / "run").run(LocalGrid(2))
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert ours.round == steps
    theirs = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert theirs.keys() == ours.params.keys()
    initial = job.initial_state()
    assert max(float((theirs[name] - initial[name]).abs().max()) for name in theirs) > 1e-3
    assert max(float((theirs[name] - ours.params[name]).abs().max()) for name in theirs) < 1e-6


@pytest.mark.parametrize(("by", "optimizer_state"), [("shm", "reset"), ("inline", "server")])
def test_the_app_is_rounds_run(by: str, optimizer_state: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(*DDP, f"flower.transport={by}", f"train.optimizer_state={optimizer_state}")
    strategy = strategy_of(job, tmp_path / "run")
    ours = strategy.run(LocalGrid())
    assert_same_run(ours, run(job, start(job), tmp_path / "oracle"))
    assert ours.moments is not None
    assert ours.moments.step == 4
    (plan_,) = strategy.folder.events("start")
    assert (plan_["num_rounds"], plan_["predicted_moment_bytes"]) == (4, 0)
    for event in strategy.folder.events("round"):
        assert (event["answered"], event["dropped"]) == ([0, 1, 2], {})
        sent = {kind: event["bytes_down"][kind] + event["bytes_up"][kind] for kind in ("weights", "moments")}
        assert sent == {"weights": round_bytes(job.layout, [full_blueprint(job.layout)] * 3), "moments": 0}


def test_it_goes_on_from_a_checkpoint(tiny_job: MakeJob, tmp_path: Path) -> None:
    """Evaluations and checkpoints are counted in intervals of two batches, as for every algorithm."""
    job = tiny_job(*DDP, "train.rounds=3", "eval.every=1", "eval.watch_windows=4", "checkpoint_every=1")
    strategy = strategy_of(job, tmp_path / "run")
    for _ in range(3):
        strategy._round(LocalGrid())
    assert [path.name for path in strategy.folder.checkpoints()] == ["round-000002"]
    again = TwistStrategy(job, strategy.folder)
    assert again.state.round == 2
    assert_same_run(again.run(LocalGrid()), run(job, start(job), tmp_path / "oracle"))
    assert [event["round"] for event in strategy.folder.events("eval")] == [2, 4, 6]
    assert [event["round"] for event in strategy.folder.events("round")] == [1, 2, 3, 4, 5, 6]


def test_a_failing_worker_leaves_the_mean_of_the_others(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(*DDP, "train.rounds=1")

    def bend(task: Task, message: Message, answer: Answer) -> list[Message]:
        return [failing("gone")(message) if (task.round, task.worker) == (2, 1) else answer()]

    ours = strategy_of(job, tmp_path / "run").run(LocalGrid(bend=bend))
    state, worker = run(job, start(job), tmp_path, num_rounds=1), Worker(job, MomentShelf(tmp_path))
    gradients = [worker.train(task, *dispatch(job, state, task)).params for task in plan(job, state)]
    for name, exp_avg in (ours.moments.values[MOMENTS[0]] if ours.moments else {}).items():
        before = state.moments.values[MOMENTS[0]][name] if state.moments else 0
        mean = (gradients[0][name] + gradients[2][name]) / 2
        torch.testing.assert_close(exp_avg, 0.9 * before + 0.1 * mean, rtol=1e-4, atol=1e-8)
    assert ours.cursors == [2, 1, 2]


def test_when_nobody_answers_nothing_moves(tiny_job: MakeJob) -> None:
    job = tiny_job(*DDP)
    state: RunState = start(job)
    after = RoundMean(job, state, plan(job, state)).finish()
    assert same(after.params, state.params)
    assert after.moments is state.moments


def test_one_worker_is_plain_training(tiny_job: MakeJob, tmp_path: Path) -> None:
    """As FedAvg with one worker and moments that travel: a continuous Adam. Dropout would have a seed per round."""
    plain = ("train.workers=1", "train.rounds=3", "model.dropout=0", "blueprint.num_sub=4")
    ddp = tiny_job(*DDP, *plain)
    fedavg = tiny_job("algorithm=fedavg", "train.optimizer_state=server", *plain)
    ours, theirs = (run(job, start(job), tmp_path) for job in (ddp, fedavg))
    assert same(ours.params, theirs.params)
