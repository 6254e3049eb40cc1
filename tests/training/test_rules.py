"""What replaces a block, of the replies that held it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from local_grid import LocalGrid, assert_same_run

from twist_fl.config.schema import load_config
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.subnet import State, mask_state, slice_state
from twist_fl.rounds import RoundMean, dispatch, plan, run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import RULE
from twist_fl.training.aggregate import Array, Rule, StreamingMean
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import adam_step
from twist_fl.training.job import Job
from twist_fl.training.rules import median, per_block, trimmed_mean
from twist_fl.training.worker import Worker

MakeJob = Callable[..., Job]

OURS = """
import numpy as np
from twist_fl import per_block

def weighted(values, weights):
    return np.average(values, axis=0, weights=weights)

mean = per_block(weighted)
flat = per_block(lambda values, weights: values.ravel())
holes = per_block(lambda values, weights: values[0] / 0)

class Nothing:
    def __init__(self, layout, state, memory): ...

def two(layout, state): ...
"""


def middle(values: Array) -> float:
    """Of the numbers in `values`, by hand: sorted, without a quarter at either end, at least one of three."""
    found = sorted(float(value) for value in values if not np.isnan(value))
    cut = max(1, len(found) // 4) if len(found) > 2 else 0
    kept = found[cut : len(found) - cut]
    return sum(kept) / len(kept)


@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [(median, partial(np.apply_along_axis, np.nanmedian)), (trimmed_mean, partial(np.apply_along_axis, middle))],
)
@pytest.mark.parametrize(("round_", "lasts"), [(1, True), (2, False)])
def test_the_middle_of_each_number_over_those_that_held_it(
    round_: int,
    lasts: bool,
    rule: Rule,
    by_hand: Callable[..., Array],
    tiny_job: MakeJob,
    random_state: Callable[..., State],
) -> None:
    """NaN where a worker held nothing; of two holders it is their mean, and what nobody held stays."""
    job = tiny_job("blueprint.policy=rolling", "train.workers=3", "blueprint.num_sub=[2,3,1]")
    old, blueprints = random_state(job.layout, 99), job.blueprints(round_)
    wholes = [random_state(job.layout, seed) for seed in range(3)]
    ones = {name: torch.ones_like(value) for name, value in old.items()}
    seen = {}
    for name in old:
        held = [mask_state(job.layout, ones, blueprint)[name].bool() for blueprint in blueprints]
        of = [np.where(mask, whole[name], np.nan) for mask, whole in zip(held, wholes, strict=True)]
        nobody = ~torch.stack(held).any(0).numpy()
        of[0][nobody] = old[name].numpy()[nobody]
        seen[name] = torch.from_numpy(by_hand(arr=np.stack(of).astype(np.float32), axis=0).astype(np.float32))
    place = {name: value.clone() for name, value in old.items()}
    aggregator = rule(job.layout, place, {})
    for blueprint, whole in zip(blueprints, wholes, strict=True):
        reply = slice_state(job.layout, whole, blueprint)
        aggregator.add(blueprint, reply, 7, None, lasts)
        if not lasts:
            for value in reply.values():
                value.fill_(1e6)
    new = aggregator.finish()
    assert all(torch.equal(new[name], seen[name]) for name in new)
    name, layout = job.division.params(job.layout)[0].name, job.layout
    blocks = [any(block in b.held("attn", 1) for b in blueprints) for block in range(4)]
    assert aggregator.held()[name].tolist() == blocks
    assert {held.all() for key, held in aggregator.held().items() if layout.by_name[key].layer is None} == {True}


def test_a_function_is_given_each_holders_weight(tiny_job: MakeJob, random_state: Callable[..., State]) -> None:
    job = tiny_job("blueprint.policy=rolling")
    rule = per_block(lambda values, weights: np.average(values, axis=0, weights=weights))
    ours, theirs = (each(job.layout, random_state(job.layout, 99), {}) for each in (StreamingMean, rule))
    for weight, blueprint in zip((1, 2, 5), job.blueprints(1), strict=True):
        reply = slice_state(job.layout, random_state(job.layout, weight), blueprint)
        for each in (ours, theirs):
            each.add(blueprint, reply, weight, None, True)
    expected, found = ours.finish(), theirs.finish()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
        assert np.array_equal(ours.held()[name], theirs.held()[name])


@pytest.mark.parametrize("outer", ["mean", "momentum"])
def test_a_users_mean_is_ours(outer: str, user_module: Callable[[str], str], tiny_job: MakeJob, tmp_path: Path) -> None:
    rule = f"aggregate.rule={user_module(OURS)}:mean"
    common = (
        "train.weighting=tokens",
        f"aggregate.optimizer={outer}",
        "train.rounds=3",
        "train.optimizer_state=server",
    )
    ours, theirs = tiny_job(*common), tiny_job(*common, rule)
    expected, found = run(ours, start(ours), tmp_path), run(theirs, start(theirs), tmp_path)
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        ("flower.transport=shm",),
        ("flower.transport=inline", "aggregate.optimizer=nesterov"),
        ("train.variant=hybrid",),
        ("algorithm=ddp",),
    ],
)
def test_the_app_is_rounds_run(overrides: tuple[str, ...], tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("flower.wait_for_nodes=0.05", "eval.every=0", "aggregate.rule=median", *overrides)
    folder = RunFolder(tmp_path / "run")
    folder.create(job)
    ours = TwistStrategy(job, folder).run(LocalGrid(len(job.clients)))
    assert_same_run(ours, run(job, start(job), tmp_path / "oracle"))


def test_ddp_steps_by_the_median_gradient(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("algorithm=ddp", "aggregate.rule=median")
    state, worker = start(job), Worker(job, MomentShelf(tmp_path))
    tasks = plan(job, state)
    mean, gradients = RoundMean(job, state, tasks), []
    for task in tasks:
        reply = worker.train(task, *dispatch(job, state, task))
        gradients.append({name: value.clone() for name, value in reply.params.items()})
        mean.add(task, reply)
    middle = {name: torch.stack([each[name] for each in gradients]).median(0).values for name in gradients[0]}
    assert state.moments is not None
    found = mean.finish().params
    expected, _ = adam_step(state.params, middle, state.moments, job.config.train, job.config.train.lr)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flat", r"the rule's function <lambda> gave an array of shape \(\d+,\), expected \(1, 1, 1, \d+\)"),
        ("holes", "the rule's function <lambda> gave values that are not finite"),
        ("Nothing", r"aggregate\.rule='\w+:Nothing' gave <.*Nothing object at .*>, expected an object with add, held "
         "and finish"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_cannot_replace_a_block_is_refused(
    name: str, reason: str, user_module: Callable[[str], str], tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job(f"aggregate.rule={user_module(OURS)}:{name}")
    with pytest.raises(ConfigError, match=f"^{reason}$"):
        run(job, start(job), tmp_path, 1)


def test_a_rule_that_cannot_be_called_is_refused_before_a_run_starts(
    user_module: Callable[[str], str], tiny_job: MakeJob
) -> None:
    module = user_module(OURS)
    with pytest.raises(ConfigError) as caught:
        tiny_job(f"aggregate.rule={module}:two")
    assert str(caught.value) == (
        f"aggregate.rule='{module}:two' must be a function (layout, state, memory) -> aggregator, found "
        "two(layout, state): too many positional arguments"
    )


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_a_robust_rule_does_not_weigh(rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"aggregate\.rule={rule} weighs all workers alike"):
        load_config(overrides=[f"aggregate.rule={rule}", "train.weighting=tokens"], strict=True)


@pytest.mark.parametrize(("num", "liars"), [(3, 1), (4, 1), (5, 1), (8, 2), (13, 3)])
@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_as_many_liars_as_a_rule_bears_move_no_number_beyond_the_honest(
    rule: str, num: int, liars: int, tiny_job: MakeJob, random_state: Callable[..., State]
) -> None:
    job = tiny_job("algorithm=fedavg", f"train.workers={num}", "data.window=8")
    honest = [random_state(job.layout, seed) for seed in range(num - liars)]
    lies = [{name: value * 1e6 for name, value in random_state(job.layout, 50 + i).items()} for i in range(liars)]
    aggregator = RULE.find(rule)(job.layout, random_state(job.layout, 99), {})
    for blueprint, reply in zip(job.blueprints(1), [*lies, *honest], strict=True):
        aggregator.add(blueprint, reply, 1, None, True)
    for name, value in aggregator.finish().items():
        of = torch.stack([reply[name] for reply in honest])
        assert bool(((of.min(0).values <= value) & (value <= of.max(0).values)).all()), name
