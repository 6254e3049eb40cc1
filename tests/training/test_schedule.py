"""Learning rates, clipping and decoupled decay: what every trainer of language models expects, the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid, assert_same_run, same
from torch import nn
from transformers import AutoModelForCausalLM, get_scheduler

from twist_fl.config.schema import TrainConfig, load_config
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.subnet import get_state, load_state
from twist_fl.rounds import run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.training.interval import next_token_loss
from twist_fl.training.job import Job
from twist_fl.training.schedule import learning_rate, learning_rates

MakeJob = Callable[..., Job]
SCHEDULES = ("constant", "linear", "cosine", "wsd")
RECIPE = (
    *("train.schedule=cosine", "train.warmup=0.2", "train.clip_norm=0.5", "train.optimizer=adamw"),
    *("train.weight_decay=0.1", "train.beta2=0.95", "flower.wait_for_nodes=0.05", "eval.every=0"),
)

configs = st.builds(
    TrainConfig,
    lr=st.floats(1e-5, 1e-1),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 0.99),
    decay=st.floats(0.01, 1),
)


@given(config=configs, total=st.integers(1, 500))
def test_every_batch_has_a_rate_that_rises_and_then_falls(config: TrainConfig, total: int) -> None:
    rates = list(learning_rates(config, 0, total, total))
    assert all(0 < rate <= config.lr for rate in rates)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@given(config=configs, total=st.integers(1, 500), data=st.data())
def test_a_rate_does_not_depend_on_when_it_is_asked_for(config: TrainConfig, total: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, total - 1))
    num_batches = data.draw(st.integers(0, total - first))
    whole = list(learning_rates(config, 0, total, total))
    assert list(learning_rates(config, first, num_batches, total)) == whole[first : first + num_batches]


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 0.0), (40, 0.25)])
def test_against_transformers_after_the_warm_up(name: str, total: int, warmup: float) -> None:
    """While it rises, theirs begins with a batch at 0, which trains nothing."""
    config = TrainConfig(lr=1e-2, schedule=name, warmup=warmup, decay=0.3)  # type: ignore[arg-type]
    rising = round(warmup * total)
    theirs = get_scheduler(
        "warmup_stable_decay" if name == "wsd" else name,
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr),
        num_warmup_steps=rising,
        num_training_steps=total,
        scheduler_specific_kwargs={"num_decay_steps": 30 * total // 100, "decay_type": "linear"}
        if name == "wsd"
        else {},
    )
    for batch in range(total):
        if batch >= rising:
            assert learning_rate(config, batch, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12), batch
        theirs.optimizer.step()
        theirs.step()


def test_one_worker_is_a_plain_loop_with_the_same_recipe(tiny_job: MakeJob, tmp_path: Path) -> None:
    """Bit for bit, over three intervals."""
    whole = ("train.workers=1", "blueprint.num_sub=4", "train.rounds=3", "train.optimizer_state=server")
    job = tiny_job(*RECIPE, *whole)
    ours, config = run(job, start(job), tmp_path), job.config.train
    model = AutoModelForCausalLM.from_config(job.model_config)  # type: ignore[no-untyped-call]
    load_state(model, job.initial_state())
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1, betas=(0.9, 0.95), eps=config.eps, weight_decay=0.1, fused=True
    )
    lengths = []
    for batch in range(job.total_batches):
        windows = torch.tensor(job.corpus.train[job.shard(0).batch(batch)], dtype=torch.int64)
        optimizer.zero_grad()
        next_token_loss(model, windows).backward()  # type: ignore[no-untyped-call]
        lengths.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.param_groups[0]["lr"] = learning_rate(config, batch, job.total_batches)
        optimizer.step()
    assert max(lengths) > 0.5
    assert same(ours.params, get_state(model))


@pytest.mark.parametrize("algorithm", ["twist", "fedavg", "ddp"])
def test_a_run_that_was_cut_and_the_app_agree_with_an_uninterrupted_one(
    algorithm: str, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # evaluation takes one core, too
    job = tiny_job(*RECIPE, f"algorithm={algorithm}", "train.rounds=3")
    once = run(job, start(job), tmp_path / "once")
    cut = run(job, run(job, start(job), tmp_path / "cut", num_rounds=2), tmp_path / "cut")
    assert_same_run(cut, once)
    folder = RunFolder(tmp_path / "run")
    folder.create(job)
    assert_same_run(TwistStrategy(job, folder).run(LocalGrid()), once)


@pytest.mark.parametrize("setting", ["schedule=linear", "warmup=0.5", "clip_norm=1e-3", "optimizer=adamw"])
@pytest.mark.parametrize("algorithm", ["twist", "ddp"])
def test_every_knob_is_used(setting: str, algorithm: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    plain = (f"algorithm={algorithm}", "train.weight_decay=0.1", "train.optimizer_state=reset")
    jobs = tiny_job(*plain), tiny_job(*plain, f"train.{setting}")
    one, other = (run(job, start(job), tmp_path / str(i)).params for i, job in enumerate(jobs))
    assert not same(one, other)


REFUSED = {
    "train.warmup=1": r"train\.warmup=1.0 must be in \[0, 1\)",
    "train.decay=0": r"train\.decay=0.0 must be in \(0, 1\]",
    "train.clip_norm=0": r"train\.clip_norm=0.0 must be more than 0",
    "train.schedule=step": "train.schedule",
    "train.optimizer=sgd": "train.optimizer",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[setting]):
        load_config(overrides=[setting])
