"""Appendix C against the paper's own Table 2."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from twist_fl.blueprint import cost
from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.division import Assign, Division, Setting
from twist_fl.blueprint.drawing import draw_round
from twist_fl.blueprint.moments import moment_layouts
from twist_fl.model.subnet import build_model
from twist_fl.training.interval import next_token_loss

GPT2 = make_layout(GPT2Config().to_dict())

# Table 2 of arXiv 2511.03983: (memory in GB, communication in TB) of setting and N_sub out of 12.
TABLE_2: dict[tuple[Setting, int], tuple[float, float]] = {
    ("attn", 10): (1.87, 44.35),
    ("attn", 8): (1.82, 43.20),
    ("attn", 6): (1.79, 42.05),
    ("attn", 4): (1.72, 40.90),
    ("both", 10): (1.77, 42.05),
    ("both", 8): (1.64, 38.60),
    ("both", 6): (1.50, 35.14),
    ("both", 4): (1.34, 31.69),
    ("ffn", 10): (1.82, 43.20),
    ("ffn", 8): (1.73, 40.90),
    ("ffn", 6): (1.63, 38.60),
    ("ffn", 4): (1.53, 36.29),
}
DDP = (1.88, 45.50)


def division(setting: Setting, num_sub: int) -> Division:
    return Division(setting, ((num_sub, num_sub),) * 4)


def test_gpt2_has_its_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert GPT2.num_params() == sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def sizes(model_type: str, d_model: int, d_inner: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    d_inner_key = "ffn_dim" if model_type == "opt" else "intermediate_size"
    shape = {"hidden_size": d_model, d_inner_key: d_inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": model_type, "vocab_size": vocab, "max_position_embeddings": 2048, **shape}


TIED = {"tie_word_embeddings": True}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (sizes("llama", 4096, 11008, 32, 32, 32000), 6_738_415_616),
    "TinyLlama-1.1B": (sizes("llama", 2048, 5632, 22, 32, 32000) | {"num_key_value_heads": 4}, 1_100_048_384),
    "Mistral-7B": (sizes("mistral", 4096, 14336, 32, 32, 32000) | {"num_key_value_heads": 8}, 7_241_732_096),
    "Qwen2-0.5B": (sizes("qwen2", 896, 4864, 24, 14, 151936) | {"num_key_value_heads": 2} | TIED, 494_032_768),
    "Qwen3-0.6B": (
        sizes("qwen3", 1024, 3072, 28, 16, 151936) | {"num_key_value_heads": 8, "head_dim": 128} | TIED,
        596_049_920,
    ),
    "opt-125m": (sizes("opt", 768, 3072, 12, 12, 50272), 125_239_296),
    "opt-350m": (
        sizes("opt", 1024, 4096, 24, 16, 50272) | {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
        331_196_416,
    ),
    "pythia-160m": (sizes("gpt_neox", 768, 3072, 12, 12, 50304), 162_322_944),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name: str) -> None:
    config, num_params = PUBLISHED[name]
    assert make_layout(config).num_params() == num_params


@pytest.mark.parametrize(("setting", "num_sub"), TABLE_2)
def test_communication_of_table_2(setting: Setting, num_sub: int) -> None:
    run = cost.run_cost(GPT2, division(setting, num_sub), rounds=0, steps=cost.PAPER_EXCHANGES)
    assert run.tb_per_step == pytest.approx(TABLE_2[setting, num_sub][1], abs=0.02)


def test_communication_of_ddp() -> None:
    assert cost.run_cost(GPT2, None, 0, cost.PAPER_EXCHANGES).tb_per_step == pytest.approx(DDP[1], abs=0.02)


def test_table_2_needs_exactly_four_undivided_layers() -> None:
    """The text says 10 layers are divided; with 10, or with all 12, the table is missed by a wide margin."""
    for first, last in ((1, 1), (0, 0), (2, 3)):
        other = Division("both", ((4, 4),) * 4, first, last)
        run = cost.run_cost(GPT2, other, 0, cost.PAPER_EXCHANGES)
        assert abs(run.tb_per_step - TABLE_2["both", 4][1]) > 1


@pytest.mark.parametrize(("setting", "num_sub"), TABLE_2)
def test_memory_of_table_2(setting: Setting, num_sub: int) -> None:
    run = cost.run_cost(GPT2, division(setting, num_sub), 1, 1)
    assert run.memory_gib == pytest.approx(TABLE_2[setting, num_sub][0], abs=0.02)


def test_memory_of_ddp() -> None:
    # The paper's 1.88 is only 0.01 above its attn 10/12, which holds 3.1 M parameters (0.05 GiB) less.
    assert cost.run_cost(GPT2, None, 1, 1).memory_gib == pytest.approx(DDP[0], abs=0.04)


def test_bytes_are_four_per_parameter_each_way() -> None:
    drawn = draw_round(GPT2, Division("both", ((3, 6), (12, 12))), 0, 1)
    sizes = [GPT2.num_params(blueprint) for blueprint in drawn]
    assert sizes[0] < sizes[1] == 124_439_808
    assert [cost.state_bytes(GPT2, blueprint) for blueprint in drawn] == [4 * size for size in sizes]
    assert cost.round_bytes(GPT2, drawn) == 8 * sum(sizes)
    assert cost.moment_bytes(moment_layouts("server", GPT2), drawn) == 2 * cost.round_bytes(GPT2, drawn)
    assert cost.moment_bytes(moment_layouts("reset", GPT2), drawn) == 0


def test_an_interval_exchanges_once() -> None:
    run = cost.run_cost(GPT2, division("both", 6), rounds=3046, steps=15 * 3046)
    assert run.tb_per_step == pytest.approx(15 * run.tb_per_interval, rel=1e-12)
    assert run.tb_per_interval == 3046 * 8 * run.subnet_params / 1e12
    assert (run.num_params, run.rounds, run.steps) == (124_439_808, 3046, 45690)


@pytest.mark.parametrize("policy", ["random", "rolling", "static"])
@pytest.mark.parametrize("assign", ["fixed", "shuffled", "drawn"])
def test_unequal_workers_cost_what_their_rounds_do(assign: Assign, policy: str) -> None:
    sizes = ((12, 6), (6, 6), (4, 12), (6, 6))
    drawn = Division("both", sizes, policy=policy, assign=assign, drawn_workers=4 if assign == "drawn" else 0)
    rounds = [draw_round(GPT2, drawn, 3, round_ + 1) for round_ in range(7)]
    found = cost.groups(GPT2, drawn, 3, rounds=7, steps=100)
    assert sum(group.workers for group in found) == 4
    terabytes = sum(group.workers * group.cost.tb_per_interval for group in found)
    assert terabytes == pytest.approx(sum(cost.round_bytes(GPT2, each) for each in rounds) / 1e12, rel=1e-12)
    assert all(group.cost.tb_per_step == pytest.approx(group.cost.tb_per_interval * 100 / 7) for group in found)
    held = Counter((b.shape[0][2], b.shape[1][2]) for each in rounds for b in each)
    shares = {size: times for group in found for size, times in group.held.items()}
    assert {size: 28 * times / sum(shares.values()) for size, times in shares.items()} == held
    largest = max(cost.training_gib(GPT2, b) for each in rounds for b in each)
    assert max(group.cost.memory_gib for group in found) == largest


def test_a_kind_that_is_not_divided_is_whole_whatever_its_size_says() -> None:
    layout = make_layout(GPT2Config().to_dict(), ffn_blocks=4)
    (found,) = cost.groups(layout, Division("attn", ((6, 6),) * 2), 0, rounds=1, steps=1)
    assert found.cost == cost.run_cost(layout, Division("attn", ((6, 4),) * 2), 1, 1)


def test_the_server_s_own_worker_is_left_out() -> None:
    unequal = Division("both", ((12, 12), (4, 4), (6, 6)))
    found = cost.groups(GPT2, unequal, 0, rounds=1, steps=1, first=1)
    assert [(group.workers, dict(group.held)) for group in found] == [(1, {(4, 4): 1}), (1, {(6, 6): 1})]


@pytest.mark.parametrize("num_sub", [(1, 3), (2, 4), (4, 1)])
def test_flops_are_those_that_torch_counts(num_sub: tuple[int, int]) -> None:
    config = GPT2Config(n_embd=16, n_head=4, n_layer=5, vocab_size=37, n_positions=12)
    layout = make_layout(config.to_dict())
    blueprint = draw_round(layout, Division("both", (num_sub,) * 4, 1, 2), 0, 1)[0]
    model = build_model(config, layout, blueprint, "sqrt")
    model.set_attn_implementation("eager")
    windows = torch.randint(37, (3, 10))
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model, windows).backward()  # type: ignore[no-untyped-call]
    assert cost.step_flops(layout, blueprint, 3, 10) == counter.get_total_flops()


def test_flops_of_the_paper_s_speed_up() -> None:
    """Table 2: 4:35:42 against 3:04:39 at `both` 4/12, and by Figure 6 385 against 263 ms a batch."""
    blueprint = draw_round(GPT2, division("both", 4), 0, 1)[0]
    ratio = cost.step_flops(GPT2, None, 2, 1024) / cost.step_flops(GPT2, blueprint, 2, 1024)
    assert 385 / 263 < ratio < 16542 / 11079
