"""Whole rounds: S = 1 is plain training, bit for bit; S > 1 is masked training and a naive mean (spec, 3 to 7)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.blueprint.moments import MOMENTS
from twist_fl.data.tokenizer import copy_tokenizer
from twist_fl.model.subnet import State, attach_factors, get_state, load_state
from twist_fl.rounds import RoundMean, RunState, dispatch, plan, run, start, twist_round
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.evaluate import perplexity
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.rewiring import rewire
from twist_fl.training.worker import Worker

MakeJob = Callable[..., Job]
ALL_KEPT = ("train.workers=1", "blueprint.num_sub=4", "train.rounds=3", "model.dropout=0.1")


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_moments(ours: Moments | None, theirs: Moments | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    assert ours.values.keys() == theirs.values.keys()
    return ours.step == theirs.step and all(same(ours.values[name], theirs.values[name]) for name in ours.values)


def whole_run(job: Job, folder: Path) -> RunState:
    return run(job, start(job), folder)


def plain_model(job: Job, state: State) -> PreTrainedModel:
    model = GPT2LMHeadModel(job.model_config)  # type: ignore[arg-type]
    load_state(model, state)
    return model


def interval_seed(job: Job, round_: int, worker: int) -> int:
    return int(np.random.SeedSequence((job.config.seed, round_, worker)).generate_state(1)[0])


def plain_interval(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, job: Job, worker: int, round_: int
) -> None:
    """Batches of interval `round_`, counted from 1, of a worker that missed none."""
    torch.manual_seed(interval_seed(job, round_, worker))
    model.train()
    first = (round_ - 1) * job.config.train.interval
    for cursor in range(first, min(first + job.config.train.interval, job.total_batches)):
        x = torch.tensor(job.corpus.train[job.shard(worker).batch(cursor)], dtype=torch.int64)
        logits = model(x, use_cache=False).logits  # a cache lays keys and values elsewhere, which may round otherwise
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def plain_adam(model: PreTrainedModel, job: Job) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=job.config.train.lr, eps=job.config.train.eps, fused=True)


@pytest.mark.parametrize("optimizer_state", ["reset", "server", "client"])
def test_one_worker_that_keeps_everything_is_plain_training(
    optimizer_state: str, tiny_job: MakeJob, tmp_path: Path
) -> None:
    """Bit for bit: a continuous Adam with `server` and `client`, a new one every interval with `reset`."""
    job = tiny_job(*ALL_KEPT, f"train.optimizer_state={optimizer_state}")
    ours = whole_run(job, tmp_path)
    model = plain_model(job, job.initial_state())
    optimizer = plain_adam(model, job)
    for round_ in (1, 2, 3):
        if optimizer_state == "reset":
            optimizer = plain_adam(model, job)
        plain_interval(model, optimizer, job, 0, round_)
    assert same(ours.params, get_state(model))
    assert not same(ours.params, job.initial_state())
    if ours.moments is not None:
        assert ours.moments.step == 6
        for name, parameter in model.named_parameters():
            assert all(torch.equal(ours.moments.values[m][name], optimizer.state[parameter][m]) for m in MOMENTS)


def test_fedavg_with_one_worker_is_the_same_run(tiny_job: MakeJob, tmp_path: Path) -> None:
    twist, fedavg = tiny_job(*ALL_KEPT), tiny_job(*ALL_KEPT, "algorithm=fedavg")
    assert same(whole_run(twist, tmp_path).params, whole_run(fedavg, tmp_path).params)


def test_fedavg_is_the_mean_of_plain_training_by_each_worker(tiny_job: MakeJob, tmp_path: Path) -> None:
    """With dropout: each worker and round has its own."""
    job = tiny_job("algorithm=fedavg", "model.dropout=0.1")
    state = job.initial_state()
    for round_ in (1, 2):
        trained = []
        for worker in range(3):
            model = plain_model(job, state)
            plain_interval(model, plain_adam(model, job), job, worker, round_)
            trained.append(get_state(model))
        state = {name: (sum(one[name].double() for one in trained) / 3).float() for name in state}  # type: ignore[union-attr]
    assert same(whole_run(job, tmp_path).params, state)


def masked_model(job: Job, state: State, blueprint: Blueprint) -> PreTrainedModel:
    def mask(kind: Any, layer: int) -> torch.Tensor:
        num_full = job.layout.num_blocks[0 if kind == "attn" else 1]
        width = (32 if kind == "attn" else 128) // num_full
        held = blueprint.held(kind, layer)
        blocks = torch.zeros(num_full)
        blocks[list(held)] = (num_full / len(held)) ** 0.5
        return blocks.repeat_interleave(width)

    model = plain_model(job, state)
    attach_factors(model, job.layout, mask)
    return model


def naive_mean(job: Job, old: State, drawn: list[Blueprint], trained: list[State]) -> State:
    new = {}
    for param in job.layout.params:
        holders = []
        for blueprint in drawn:
            held = torch.zeros(param.shape, dtype=torch.bool)
            ids = job.layout.held(param, blueprint)
            index = range(param.shape[param.dim]) if ids is None else param.index(ids)
            held.index_fill_(param.dim, torch.tensor(index), True)
            holders.append(held)
        count = torch.stack(holders).sum(0)
        total = torch.stack([state[param.name] * held for state, held in zip(trained, holders, strict=True)]).sum(0)
        new[param.name] = torch.where(count > 0, total / count.clamp_min(1), old[param.name])
    return new


@pytest.mark.parametrize(
    "overrides",
    [
        ("blueprint.setting=both", "blueprint.ffn_blocks=8", "blueprint.num_sub=2+3"),
        ("blueprint.setting=attn",),
        ("blueprint.setting=ffn", "blueprint.num_sub=[1,2,3]"),
        ("algorithm=fedavg",),
    ],
)
def test_against_masked_training_and_a_naive_mean(
    overrides: tuple[str, ...], tiny_job: MakeJob, tmp_path: Path
) -> None:
    """Two rounds of the masked variant: whole models, zeroed blocks, a mean over holders.

    eps is large against the rounding noise in gradients that are zero on paper (key biases), which Adam would
    otherwise blow up to whole steps.
    """
    job = tiny_job("train.eps=1e-3", *overrides)
    ours = whole_run(job, tmp_path)
    state = job.initial_state()
    for round_ in (1, 2):
        drawn, trained = job.blueprints(round_), []
        for worker, blueprint in enumerate(drawn):
            model = masked_model(job, state, blueprint)
            plain_interval(model, plain_adam(model, job), job, worker, round_)
            trained.append(get_state(model))
        state = naive_mean(job, state, drawn, trained)
    for name, value in ours.params.items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=2e-6, msg=name)
    moved = max(float((value - job.initial_state()[name]).abs().max()) for name, value in ours.params.items())
    assert moved > 1e-2


@pytest.mark.parametrize("optimizer_state", ["reset", "client", "server", "factored"])
def test_a_run_is_deterministic_and_can_be_cut_anywhere(
    optimizer_state: str, tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job(f"train.optimizer_state={optimizer_state}", "train.rounds=3", "model.dropout=0.1")
    once = whole_run(job, tmp_path / "once")
    cut = run(job, start(job), tmp_path / "cut", num_rounds=1)
    cut = run(job, cut, tmp_path / "cut")
    assert cut.round == once.round == 3
    assert cut.cursors == once.cursors == [6, 6, 6]
    assert same(cut.params, once.params)
    assert same_moments(cut.moments, once.moments)
    assert (once.moments is not None) == (optimizer_state in ("server", "factored"))


def test_the_four_optimiser_states_differ(tiny_job: MakeJob, tmp_path: Path) -> None:
    found = [
        whole_run(tiny_job(f"train.optimizer_state={name}"), tmp_path / name).params["transformer.wte.weight"]
        for name in ("reset", "client", "server", "factored")
    ]
    assert not any(torch.equal(one, other) for one, other in combinations(found, 2))


def test_the_seed_changes_the_run(tiny_job: MakeJob, tmp_path: Path) -> None:
    assert not same(whole_run(tiny_job(), tmp_path).params, whole_run(tiny_job("seed=1"), tmp_path).params)


def test_the_last_shorter_interval_is_trained(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("train.rounds=null", "train.epochs=1", "train.batch_size=64", "train.interval=3")
    per_epoch = job.shard(0).batches_per_epoch
    assert per_epoch % 3, "choose another batch size: this text gives whole intervals"
    assert job.total_batches == per_epoch
    assert job.num_rounds == per_epoch // 3 + 1
    state, worker, num_batches = start(job), Worker(job, MomentShelf(tmp_path)), []
    seen: list[int] = [0, 0, 0]
    while state.round < job.num_rounds:
        tasks = plan(job, state)
        num_batches.append({task.num_batches for task in tasks})
        for task in tasks:
            seen[task.worker] += sum(len(batch) for batch in worker.batches(task))
        state, report = twist_round(job, state, [worker] * 3)
        assert not report.dropped
    assert num_batches == [{3}] * (per_epoch // 3) + [{per_epoch % 3}]
    assert seen == [job.shard(0).size] * 3  # every window of the epoch, once
    assert state.cursors == [per_epoch] * 3


def test_training_lowers_the_loss(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("train.rounds=8")
    states = job.initial_state(), whole_run(job, tmp_path).params
    before, after = (perplexity(plain_model(job, state), job.corpus.test, 8) for state in states)
    assert before == pytest.approx(job.corpus.vocab_size, rel=0.1)  # uniform guessing
    assert after < before / 3


def test_a_worker_that_fails_once_goes_on_where_it_was(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("train.rounds=3")
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks)
    for task in tasks[1:]:
        mean.add(task, worker.train(task, *dispatch(job, state, task)))
    state = mean.finish()
    assert [(task.round, task.cursor) for task in plan(job, state)] == [(2, 0), (2, 2), (2, 2)]
    assert mean.report.answered == [1, 2]


def test_the_report_is_a_token_mean(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job()
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    _, report = twist_round(job, state, [worker] * 3)
    replies = [worker.train(task, *dispatch(job, state, task)) for task in plan(job, state)]
    assert [reply.num_tokens for reply in replies] == [2 * 2 * 15] * 3
    assert report.num_tokens == 180
    assert report.loss == pytest.approx(sum(reply.loss for reply in replies) / 3, rel=1e-12)
    assert (report.round, report.answered, report.dropped) == (1, [0, 1, 2], {})


def test_what_is_sent_is_what_the_blueprint_names(tiny_job: MakeJob) -> None:
    job = tiny_job("train.optimizer_state=server")
    state = start(job)
    for task in plan(job, state):
        params, moments = dispatch(job, state, task)
        assert sum(value.numel() for value in params.values()) == job.layout.num_params(task.blueprint)
        assert moments is not None
        for name in MOMENTS:
            assert {key: value.shape for key, value in moments.values[name].items()} == {
                key: value.shape for key, value in params.items()
            }
            assert not any(value.any() for value in moments.values[name].values())


def test_training_leaves_the_server_state_alone(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("train.optimizer_state=server")
    state = start(job)
    before = {name: value.clone() for name, value in state.params.items()}
    worker = Worker(job, MomentShelf(tmp_path))
    for task in plan(job, state):
        worker.train(task, *dispatch(job, state, task))
    assert same(state.params, before)
    assert state.moments is not None
    assert not any(value.any() for name in MOMENTS for value in state.moments.values[name].values())


# Client-side moments


def test_a_client_keeps_moments_of_what_it_always_holds(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("train.optimizer_state=client", "blueprint.setting=attn")
    whole_run(job, tmp_path)
    moments = MomentShelf(tmp_path).load(0, 3)
    assert moments is not None
    assert moments.step == 4
    names = ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    divided = {f"transformer.h.{layer}.attn.{name}" for layer in (1, 2) for name in names}
    assert all(moments.values[name].keys() == job.layout.by_name.keys() - divided for name in MOMENTS)


@pytest.mark.parametrize("assign", ["fixed", "shuffled", "drawn"])
def test_a_client_keeps_no_moments_of_blocks_that_change(assign: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    """Also when it holds all of them in one round: the next one's, of fewer, would be other blocks' moments."""
    job = tiny_job(
        *("train.optimizer_state=client", f"blueprint.assign={assign}", "blueprint.num_sub=4+4,2+4,2+4"),
        "train.rounds=4",
    )
    whole_run(job, tmp_path)
    attention = {param.name for param in job.layout.params if param.kind == "attn" and param.layer in (1, 2)}
    for worker in range(3):
        moments = MomentShelf(tmp_path).load(worker, 5)
        assert moments is not None
        gone = set() if assign == "fixed" and worker == 0 else attention
        assert all(moments.values[name].keys() == job.layout.by_name.keys() - gone for name in MOMENTS)
        for name in MOMENTS:
            assert all(moments.values[name][key].shape == job.layout.by_name[key].shape for key in moments.values[name])


def test_a_shelf_serves_the_round_asked_for(tmp_path: Path) -> None:
    shelf = MomentShelf(tmp_path)
    assert shelf.load(0, 1) is None
    for round_ in (1, 2, 3):
        values = {name: {"a": torch.full((2,), float(round_)), "b": torch.ones(1)} for name in MOMENTS}
        shelf.save(0, round_, Moments(10 * round_, values), ["a"], keep_from=0)
    found = shelf.load(0, 3)  # resumed from a checkpoint after round 2: round 3 is abandoned
    assert found is not None
    assert found.step == 20
    assert {name: list(values) for name, values in found.values.items()} == {name: ["a"] for name in MOMENTS}
    assert torch.equal(found.values["exp_avg"]["a"], torch.tensor([2.0, 2.0]))
    assert shelf.load(1, 3) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"worker-0-round-{r}" for r in (1, 2)]
    shelf.save(0, 4, replace(found, step=40), ["a"], keep_from=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"worker-0-round-{r}" for r in (2, 4)]


# Pretrained models


@pytest.fixture
def pretrained(tiny_job: MakeJob, tmp_path: Path) -> Path:
    job = tiny_job("model.n_layer=6")
    torch.manual_seed(3)
    GPT2LMHeadModel(job.model_config).save_pretrained(tmp_path / "checkpoint")  # type: ignore[arg-type]
    copy_tokenizer(job.corpus.tokenizer_folder, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_run_starts_rewired(pretrained: Path, tiny_job: MakeJob) -> None:
    job = tiny_job(f"model.pretrained={pretrained}", "blueprint.common=1", "blueprint.rewire=true")
    before, found = job.initial_state(), start(job).params
    expected = rewire(job, before)
    assert same(found, expected)
    assert not same(found, before)


def test_a_pretrained_checkpoint_is_trained(pretrained: Path, tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(f"model.pretrained={pretrained}")
    assert job.layout.num_layers == 6  # the checkpoint's, not the configuration's
    assert same(job.initial_state(), get_state(GPT2LMHeadModel.from_pretrained(pretrained)))
    assert not same(whole_run(job, tmp_path / "run").params, job.initial_state())


def test_a_window_longer_than_the_pretrained_context(pretrained: Path, tiny_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=r"data\.window=64 is longer than the model's context: use at most 32"):
        tiny_job(f"model.pretrained={pretrained}", "data.window=64", "model.n_positions=64")


def test_a_tokenizer_larger_than_the_pretrained_vocabulary(pretrained: Path, tiny_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ tokens and .* only \d+: leave data\.tokenizer out"):
        larger = tiny_job("data.vocab_size=400").corpus.tokenizer_folder
        tiny_job(f"model.pretrained={pretrained}", f"data.tokenizer={larger}")


def test_a_pretrained_model_brings_its_tokenizer(
    pretrained: Path, tiny_job: MakeJob, text_folder: Path, tmp_path: Path
) -> None:
    own = json.loads((pretrained / "tokenizer.json").read_text())
    (tmp_path / "other.txt").write_text((text_folder / "train.txt").read_text()[::-1])
    job = tiny_job(f"model.pretrained={pretrained}", f"data.path={tmp_path / 'other.txt'}", "data.vocab_size=280")
    assert json.loads((job.corpus.tokenizer_folder / "tokenizer.json").read_text()) == own
    (pretrained / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer='.*/checkpoint' has no tokenizer\.json: give a folder that"
    ):
        tiny_job(f"model.pretrained={pretrained}")


def test_an_untied_head_is_a_parameter_of_its_own(pretrained: Path, tiny_job: MakeJob, tmp_path: Path) -> None:
    config = GPT2Config.from_pretrained(pretrained)
    config.tie_word_embeddings = False
    GPT2LMHeadModel(config).save_pretrained(pretrained)
    job = tiny_job(f"model.pretrained={pretrained}")
    before, after = job.initial_state(), whole_run(job, tmp_path / "run").params
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert not torch.equal(after[name], before[name])
    assert not torch.equal(after["lm_head.weight"], after["transformer.wte.weight"])


def test_the_initial_state_is_the_seeds(tiny_job: MakeJob) -> None:
    job, other = tiny_job(), tiny_job("seed=1")
    assert same(job.initial_state(), job.initial_state())
    assert not same(job.initial_state(), other.initial_state())
    job.layout.check_names({name: tuple(value.shape) for name, value in job.initial_state().items()})


def test_fedavg_gives_everybody_everything(tiny_job: MakeJob) -> None:
    job = tiny_job("algorithm=fedavg")
    assert job.blueprints(1) == [full_blueprint(job.layout)] * 3
