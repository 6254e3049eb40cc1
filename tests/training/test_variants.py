"""True, masked and hybrid are one method: logits, gradients, weights after a round (paper, section 4.1; spec, 7)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import UNEVEN_GPT2 as CONFIG
from families import UNEVEN_LAYOUT as LAYOUT
from flwr.app import Message
from local_grid import Answer, LocalGrid, assert_same_run, failing, same
from transformers import PreTrainedModel

from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.cost import moment_bytes, round_bytes
from twist_fl.blueprint.division import Division, Setting
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.masked import MaskedModel
from twist_fl.model.subnet import ModelCache, State, mask_state, slice_state, take_back
from twist_fl.rounds import RoundMean, RunState, dispatch, own_last, plan, run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import train_interval
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker

MakeJob = Callable[..., Job]


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes all cores; here it takes one, as everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


def ticket(setting: Setting = "both", draw: int = 0) -> Blueprint:
    return draw_ticket(LAYOUT, Division(setting, (), 1, 2), (3, 2), seed=0, draw=draw)


def in_float64(models: ModelCache, blueprint: Blueprint) -> ModelCache:
    for parameter in models.warm(blueprint).parameters():
        parameter.data = parameter.data.double()
    return models


def results(model: PreTrainedModel) -> tuple[torch.Tensor, State]:
    """Logits, and gradients of a random weighting of them: every one counts, and no symmetry hides an error."""
    model.train(False)
    model.zero_grad()
    logits = model(torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0)), use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scale", ["sqrt", "linear", "none"])
@pytest.mark.parametrize("setting", ["attn", "ffn", "both"])
def test_logits_and_gradients_in_float64(setting: Setting, scale: Scale, random_state: Callable[..., State]) -> None:
    full = full_blueprint(LAYOUT)
    masked = MaskedModel(in_float64(ModelCache(CONFIG, LAYOUT, scale), full))
    hybrid = MaskedModel(ModelCache(CONFIG, LAYOUT, scale))
    for draw in (0, 1):  # the warm model's masks are those of the blueprint it was last asked for
        state, blueprint = random_state(LAYOUT, draw, torch.float64), ticket(setting, draw)
        true = in_float64(ModelCache(CONFIG, LAYOUT, scale), blueprint)
        logits, grads = results(true.load_sliced(blueprint, state))
        for model in (masked.load(blueprint, state), hybrid.load(blueprint, state, in_place=True)):
            our_logits, our_grads = results(model)
            torch.testing.assert_close(our_logits, logits, rtol=1e-10, atol=1e-10)
            sliced = slice_state(LAYOUT, our_grads, blueprint)
            assert sliced.keys() == grads.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(sliced[name], grad, rtol=1e-10, atol=1e-10, msg=name)
            beside = mask_state(LAYOUT, our_grads, blueprint)
            assert all(torch.equal(grad, beside[name]) for name, grad in our_grads.items())  # zero where it is masked


def test_a_state_lent_to_a_model_is_no_copy_and_trains_the_state_in_place(tiny_job: MakeJob) -> None:
    job = tiny_job("train.variant=hybrid")
    state, (blueprint, *_) = job.initial_state(), job.blueprints(1)
    before = {name: value.clone() for name, value in state.items()}
    masked = MaskedModel(job.models())
    model = masked.load(blueprint, state, in_place=True)
    assert {p.data_ptr() for p in model.parameters()} == {value.data_ptr() for value in state.values()}
    train_interval(model, [torch.arange(16)[None]] * 2, job.config.train, 0)
    taken, was = slice_state(job.layout, state, blueprint), slice_state(job.layout, before, blueprint)
    assert not any(torch.equal(taken[name], was[name]) for name in taken if name.endswith("c_proj.weight"))
    for param in job.layout.params:
        held = job.layout.held(param, blueprint)
        if held is not None:
            others = sorted(set(range(param.num_blocks)) - set(held))
            shape = param.blocked(param.num_blocks)
            assert torch.equal(*(s[param.name].reshape(shape)[:, :, others] for s in (state, before)))
    take_back(model)
    assert not {p.data_ptr() for p in model.parameters()} & {value.data_ptr() for value in state.values()}


VARIANTS = ("true", "masked", "hybrid")
QUERY_HEADS = ("model.architecture=llama", "model.n_kv_head=2", "blueprint.attn_blocks=heads")


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.optimizer_state=reset",),
        ("train.optimizer_state=client",),
        ("train.optimizer_state=server", "blueprint.ffn_blocks=8", "blueprint.num_sub=2+3"),
        ("train.optimizer_state=factored",),
        ("blueprint.num_sub=[1,4,2]", "blueprint.setting=ffn", "blueprint.assign=shuffled"),
        QUERY_HEADS,
    ],
)
def test_weights_after_three_rounds(overrides: tuple[str, ...], tiny_job: MakeJob, tmp_path: Path) -> None:
    """To rounding. eps is large against the noise in gradients that are zero on paper (key biases), which Adam would
    otherwise blow up to whole steps."""
    jobs = [tiny_job("train.eps=1e-3", "train.rounds=3", f"train.variant={name}", *overrides) for name in VARIANTS]
    true, *others = (run(job, start(job), tmp_path / job.run_id) for job in jobs)
    assert not same(true.params, jobs[0].initial_state())
    for ours in others:
        for name, value in true.params.items():
            torch.testing.assert_close(ours.params[name], value, rtol=1e-5, atol=5e-6, msg=name)
        for moment, values in true.moments.values.items() if true.moments else ():
            for name, value in values.items():
                assert ours.moments is not None
                torch.testing.assert_close(ours.moments.values[moment][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_keys_and_values_that_query_heads_share_are_the_mean_of_all_workers(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(*QUERY_HEADS)
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    tasks, replies = plan(job, state), list[State]()
    mean = RoundMean(job, state, tasks)
    for task in tasks:
        reply = worker.train(task, *dispatch(job, state, task))
        replies.append({name: value.clone() for name, value in reply.params.items()})
        mean.add(task, reply)
    after, shared = mean.finish().params, [param.name for param in job.layout.params if param.is_shared]
    assert len(shared) == 2 * 5
    assert set(shared) < job.always_whole(0)
    for name in shared:
        torch.testing.assert_close(after[name], torch.stack([each[name] for each in replies]).mean(0), msg=name)


@pytest.mark.parametrize("optimizer_state", ["server", "factored"])
def test_what_nobody_answered_for_does_not_move(optimizer_state: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    """In the hybrid the server's momentum must not move its masked blocks, which nobody's reply puts right."""
    found: list[RunState] = []
    for name in VARIANTS:
        job = tiny_job("train.eps=1e-3", f"train.optimizer_state={optimizer_state}", f"train.variant={name}")
        worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
        for missing in ((), (1, 2)):
            tasks = plan(job, state)
            before = {key: value.clone() for key, value in state.params.items()}
            mean, replies = RoundMean(job, state, tasks, in_place=True), []
            for task, _ in own_last(job, tasks, [worker] * 3):
                if task.worker not in missing:
                    reply = worker.train(task, *dispatch(job, state, task), in_place=task.worker not in job.clients)
                    params = {key: value.clone() for key, value in reply.params.items()}
                    replies.append((task, replace(reply, params=params)))
            for task, reply in reversed(replies):  # as the strategy: the server's own first, which lies in the state
                mean.add(task, reply)
            state = mean.finish()
        assert state.debt
        for kind, layer, block in state.debt:
            for param in job.layout.params:
                if (param.kind, param.layer) == (kind, layer):
                    index = torch.tensor(param.index([block]))
                    old, new = (s[param.name].index_select(param.dim, index) for s in (before, state.params))
                    assert torch.equal(old, new), (name, param.name)
        found.append(state)
    for ours in found[1:]:
        for key, value in found[0].params.items():
            torch.testing.assert_close(ours.params[key], value, rtol=1e-5, atol=5e-6, msg=key)


def strategy_of(job: Job, folder: Path) -> TwistStrategy:
    kept = RunFolder(folder)
    kept.create(job)
    return TwistStrategy(job, kept)


@pytest.mark.parametrize(
    ("optimizer_state", "by"),
    [("reset", "inline"), ("client", "shm"), ("server", "shm"), ("server", "inline"), ("factored", "shm")],
)
@pytest.mark.parametrize("variant", ["masked", "hybrid"])
def test_the_app_is_rounds_run(variant: str, optimizer_state: str, by: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(
        *(f"train.variant={variant}", f"train.optimizer_state={optimizer_state}", f"flower.transport={by}"),
        *("model.dropout=0.1", "flower.wait_for_nodes=0.05", "eval.every=1", "eval.watch_windows=4"),
    )
    strategy, grid = strategy_of(job, tmp_path / "run"), LocalGrid(len(job.clients))
    ours = strategy.run(grid)
    assert_same_run(ours, run(job, start(job), tmp_path / "oracle"))
    assert not same(ours.params, job.initial_state())
    assert [served.task.worker for served in grid.served] == [*job.clients] * 2
    (plan_,) = strategy.folder.events("start")
    for event in strategy.folder.events("round"):
        assert (event["answered"], event["dropped"]) == ([0, 1, 2], {})
        drawn, full = job.blueprints(event["round"]), full_blueprint(job.layout)
        travelled = [full] * 3 if variant == "masked" else drawn[1:]
        sent = {kind: event["bytes_down"][kind] + event["bytes_up"][kind] for kind in ("weights", "moments")}
        moments = moment_bytes(job.moment_layouts, travelled)
        assert sent == {"weights": round_bytes(job.layout, travelled), "moments": moments}
        assert (plan_["predicted_round_bytes"], plan_["predicted_moment_bytes"]) == (sent["weights"], moments)


def test_the_server_trains_while_its_clients_do(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After both messages went out, and before the first reply is looked for."""
    seen: list[str] = []

    class Watched(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            seen.append("push")
            return super().push_messages(messages)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            seen.append("pull")
            return super().pull_messages(message_ids)

    strategy, grid = strategy_of(tiny_job("train.variant=hybrid", "eval.every=0"), tmp_path / "run"), Watched(2)
    strategy.nodes.connect(grid, 0)
    seen.clear()
    train_own = strategy._train_own

    def watched(mean: RoundMean) -> None:
        seen.append("train")
        train_own(mean)

    monkeypatch.setattr(strategy, "_train_own", watched)
    strategy._round(grid)
    assert seen == ["push", "push", "train", "pull"]
    (event,) = strategy.folder.events("round")
    assert 0 < event["training_seconds"] < event["seconds"]


def test_subnets_are_evaluated_where_only_the_first_worker_holds_all(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("blueprint.num_sub=[4,2,1]", "eval.every=1", "eval.watch_windows=4", "flower.wait_for_nodes=0.05")
    strategy = strategy_of(job, tmp_path / "run")
    strategy.run(LocalGrid())
    assert all("subnets" in event for event in strategy.folder.events("eval"))


def held_bytes(job: Job, worker: int, folder: Path) -> dict[str, int]:
    """Bytes of float32 parameters, gradients and moments that training one worker's subnet takes."""
    own, state = Worker(job, MomentShelf(folder)), start(job)
    task = plan(job, state)[worker]
    params, _ = dispatch(job, state, task)
    pointers = {value.data_ptr() for value in state.params.values()}
    model = own.load(task, params, in_place=worker not in job.clients)
    mine = [p for p in model.parameters() if p.data_ptr() not in pointers]
    moments = train_interval(model, own.batches(task), job.config.train, 0).moments
    return {
        "parameters": sum(p.nbytes for p in mine),
        "gradients": sum(p.nbytes for p in model.parameters()),
        "moments": sum(value.nbytes for values in moments.values.values() for value in values.values()),
    }


def test_what_each_variant_holds(tiny_job: MakeJob, tmp_path: Path) -> None:
    """The hybrid's server has gradients and moments of the whole model, but no second copy of its parameters."""
    job = tiny_job()
    full, subnet = (4 * job.layout.num_params(blueprint) for blueprint in (None, job.blueprints(1)[0]))
    expected = {
        "true": {"parameters": subnet, "gradients": subnet, "moments": 2 * subnet},
        "masked": {"parameters": full, "gradients": full, "moments": 2 * full},
        "hybrid": {"parameters": 0, "gradients": full, "moments": 2 * full},
    }
    for name in VARIANTS:
        assert held_bytes(tiny_job(f"train.variant={name}"), 0, tmp_path) == expected[name]
    assert held_bytes(tiny_job("train.variant=hybrid"), 1, tmp_path) == expected["true"]


def test_decay_of_masked_blocks_does_not_reach_the_server(tiny_job: MakeJob, tmp_path: Path) -> None:
    runs: list[RunState] = []
    for name in ("true", "masked"):
        job = tiny_job("train.weight_decay=0.1", "train.eps=1e-3", f"train.variant={name}")
        runs.append(run(job, start(job), tmp_path / name))
    for key, value in runs[0].params.items():
        torch.testing.assert_close(runs[1].params[key], value, rtol=1e-5, atol=5e-6, msg=key)


def test_the_server_cannot_go_on_if_its_own_training_fails(tiny_job: MakeJob, tmp_path: Path) -> None:
    """Its parameters are spoiled in place: the run stops, and goes on from its checkpoint."""
    job = tiny_job("train.variant=hybrid", "train.lr=1e38", "flower.wait_for_nodes=0.05")
    with pytest.raises(ReplyError, match=r"^the server's own training failed, resume .*: .* (is nan|not finite)"):
        strategy_of(job, tmp_path / "run").run(LocalGrid(2))


def test_without_any_client_the_server_does_not_go_on_alone(tiny_job: MakeJob, tmp_path: Path) -> None:
    def bend(task: Task, message: Message, answer: Answer) -> list[Message]:
        return [failing("gone")(message)]

    strategy = strategy_of(tiny_job("train.variant=hybrid", "flower.wait_for_nodes=0.05"), tmp_path / "run")
    with pytest.raises(NoWorkersError, match=r"round 1: no worker answered: .*1: 'ValueError: gone'"):
        strategy.run(LocalGrid(2, bend=bend))


REFUSED = {
    "train.variant=masked algorithm=fedavg": "train.variant=masked masks nothing with algorithm=fedavg",
    "train.variant=hybrid algorithm=ddp": "train.variant=hybrid masks nothing with algorithm=ddp",
    "train.variant=hybrid train.workers=1 blueprint.num_sub=4": "train.workers=1 leaves no client beside the server",
    "train.variant=hybrid train.weight_decay=0.1": "train.weight_decay=0.1 would shrink those that are masked",
    "train.variant=hybrid train.compile=true": "does not compile the server's model: set train.compile=false",
    "train.variant=mask": "train.variant='mask' must be one of true, masked, hybrid, did you mean 'masked'?",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_refused(overrides: str, tiny_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[overrides])):
        tiny_job(*overrides.split())
