"""Theorems A.6 and A.10, measured on layers with the paper's random initialisation (appendix A.3)."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from transformers import GPT2Config

from twist_fl.blueprint.architectures import KINDS, Kind
from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.blueprint import Scale
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.model.subnet import ModelCache, State

D_MODEL, BLOCKS, LAYERS = 192, 12, 3
CONFIG = GPT2Config(
    vocab_size=4,
    n_positions=64,
    n_embd=D_MODEL,
    n_layer=LAYERS,
    n_head=BLOCKS,
    activation_function="relu",
    bos_token_id=0,
    eos_token_id=0,
)
LAYOUT = make_layout(CONFIG.to_dict(), BLOCKS)
DIVISION = Division("both", (), 1, 1)


def he_state(seed: int) -> State:
    """W_QKV ~ N(0, 1/d_model), C_attn ~ N(0, 1/(H d_head)), W_ffn ~ N(0, 2/d_model), C_ffn ~ N(0, 1/d_inner)."""
    generator = torch.Generator().manual_seed(seed)
    variance = {"c_attn": 1 / D_MODEL, "attn.c_proj": 1 / D_MODEL, "c_fc": 2 / D_MODEL, "mlp.c_proj": 1 / (4 * D_MODEL)}
    state = {}
    for param in LAYOUT.params:
        spread = next((sqrt(value) for key, value in variance.items() if f"{key}.weight" in param.name), 0.0)
        state[param.name] = spread * torch.randn(param.shape, generator=generator)
    return state


def mean_ratio(kind: Kind, num_sub: int, scale: Scale) -> float:
    """Mean norm of a layer's output rows in random subnets, over that of the full layer, for inputs N(0, I)."""
    models = ModelCache(CONFIG, LAYOUT, scale)
    subnet_norm = full_norm = 0.0
    for seed in range(4):
        state = he_state(seed)
        x = torch.randn(2, 64, D_MODEL, generator=torch.Generator().manual_seed(100 + seed))
        ticket = draw_ticket(LAYOUT, DIVISION, (num_sub, num_sub), seed, 0)
        for blueprint in (ticket, full_blueprint(LAYOUT)):
            layer = models.load_sliced(blueprint, state).train(False).transformer.h[1]
            with torch.inference_mode():
                y = layer.attn(x)[0] if kind == "attn" else layer.mlp(x)
            norm = float(y.norm(dim=-1).mean())
            if blueprint is ticket:
                subnet_norm += norm
            else:
                full_norm += norm
    return subnet_norm / full_norm


@pytest.mark.parametrize("num_sub", [3, 6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_dropping_blocks_shrinks_the_output_by_the_square_root(kind: Kind, num_sub: int) -> None:
    assert mean_ratio(kind, num_sub, "none") == pytest.approx(sqrt(num_sub / BLOCKS), rel=0.02)


@pytest.mark.parametrize("num_sub", [3, 6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_brings_the_norm_back(kind: Kind, num_sub: int) -> None:
    assert mean_ratio(kind, num_sub, "sqrt") == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_factor_overshoots(kind: Kind) -> None:
    assert mean_ratio(kind, 3, "linear") == pytest.approx(sqrt(BLOCKS / 3), rel=0.02)
