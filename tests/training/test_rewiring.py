"""Rewiring: the same function, the most important units in the common blocks, the others dealt evenly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.schema import load_config
from twist_fl.system.errors import ConfigError
from twist_fl.training.importance import block_scores
from twist_fl.training.job import Job
from twist_fl.training.rewiring import rewire, rewired


def logits(job: Job, state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = job.models().load(full_blueprint(job.layout), state).double()
    model.train(False)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(job.corpus.test[:3].astype("int64"))).logits
    return found


@pytest.mark.parametrize(
    "model",
    [
        ("model.architecture=gpt2",),
        ("model.architecture=llama", "model.n_kv_head=4"),
        ("model.architecture=llama", "model.n_kv_head=2", "blueprint.num_sub=1/1", "eval.sizes=1/2"),
        ("model.architecture=llama", "model.n_kv_head=2", "blueprint.attn_blocks=heads"),
        ("model.architecture=qwen2", "model.n_kv_head=4"),
        ("model.architecture=opt",),
        ("model.architecture=gpt_neox",),
    ],
    ids=lambda words: " ".join(word.partition("=")[2] for word in words),
)
def test_the_model_computes_the_same(
    model: tuple[str, ...], tiny_job: Callable[..., Job], random_state: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Logits in float64, random biases and norms among the parameters; attention and the FFN both move."""
    job = tiny_job(*model, "blueprint.common=1")
    before = random_state(job.layout)
    after = rewire(job, before)
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    torch.testing.assert_close(logits(job, after), logits(job, before), rtol=1e-9, atol=1e-9)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    divided = {param.name for param in job.division.params(job.layout)}
    shared_keys = job.layout.num_blocks[0] != job.layout.sizes["kv_heads"]
    kinds = {param.kind for param in job.layout.params if param.name in moved}
    assert moved <= divided
    assert kinds == ({"ffn"} if shared_keys else {"attn", "ffn"})


def test_common_blocks_matter_most(
    tiny_job: Callable[..., Job], random_state: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Scored again after it, on other text."""
    job = tiny_job("blueprint.common=1")
    after = rewire(job, random_state(job.layout))
    scores = block_scores(job, after, job.corpus.train[:8])
    assert len(scores) == 4
    assert all(first >= max(others) for first, *others in scores.values())


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_the_order(width: int, num_blocks: int, data: st.DataObject) -> None:
    common = data.draw(st.integers(0, num_blocks))
    importance = torch.tensor(data.draw(st.permutations(range(width * num_blocks))))
    order = rewired(importance, num_blocks, common)
    assert sorted(order) == list(range(width * num_blocks))
    blocks = importance[order].reshape(num_blocks, width)
    if 0 < common < num_blocks:
        assert blocks[:common].min() > blocks[common:].max()
    ranks = blocks[common:].sort(descending=True).values  # dealt in turn: the k-th of each block are neighbours
    for k in range(width - 1):
        assert ranks.numel() == 0 or ranks[:, k].min() > ranks[:, k + 1].max()


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r"is trained already: give model\.pretrained=FOLDER_OR_NAME"):
        load_config("finetune")
    with pytest.raises(ConfigError, match="use one"):
        load_config("finetune", ["model.pretrained=some/model", "blueprint.policy=importance"])
