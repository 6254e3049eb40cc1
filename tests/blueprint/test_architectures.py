"""Every law for every architecture of the table, on tiny random models (spec, sections 1, 3, 4, 7 and 10)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import CONFIGS, CONTEXT, FAMILIES, FFN_BLOCKS, LAYERS, LAYOUTS, OF_HEADS, VOCAB, layout_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel

from twist_fl.blueprint import architectures
from twist_fl.blueprint.architectures import KINDS, Blocks, Row, use_architecture
from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_round, draw_ticket, full_blueprint
from twist_fl.config.schema import TrainConfig
from twist_fl.data.tokenizer import copy_tokenizer
from twist_fl.model.hf_config import config_from_dict, padding_token
from twist_fl.model.subnet import (
    ModelCache,
    State,
    attach_factors,
    build_model,
    fold_scale,
    get_state,
    load_state,
    slice_state,
    take_back,
)
from twist_fl.rounds import run, start
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import ARCHITECTURE
from twist_fl.tickets.checking import ticket_model
from twist_fl.tickets.export import export_ticket, make_ticket, ticket_memory_bytes
from twist_fl.tickets.measuring import quiet_environment
from twist_fl.training.aggregate import StreamingMean
from twist_fl.training.interval import next_token_loss, train_interval
from twist_fl.training.job import Job, job_from_json

RandomState = Callable[..., State]
every_model = pytest.mark.parametrize("name", CONFIGS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def plain_model(name: str) -> PreTrainedModel:
    """Hugging Face's own class, untouched."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name])  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def ticket(name: str, draw: int = 0) -> Blueprint:
    """Layers 1 and 2 are divided."""
    return draw_ticket(LAYOUTS[name], Division("both", (), 1, 0), (3, 2), seed=0, draw=draw)


def tokens(width: int = CONTEXT) -> torch.Tensor:
    return torch.randint(VOCAB, (3, width), generator=torch.Generator().manual_seed(0))


def with_state(model: PreTrainedModel, state: State) -> PreTrainedModel:
    """In the state's precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(next(iter(state.values())).dtype)
    load_state(model, state)
    model.train(False)
    return model


def physical_model(name: str, state: State, blueprint: Blueprint) -> PreTrainedModel:
    model = build_model(CONFIGS[name], LAYOUTS[name], blueprint, "sqrt")
    return with_state(model, slice_state(LAYOUTS[name], state, blueprint))


def masked_model(name: str, state: State, blueprint: Blueprint) -> PreTrainedModel:
    """The whole model; what the blueprint does not name is multiplied by zero."""

    def mask(kind: Any, layer: int) -> torch.Tensor:
        num_full = LAYOUTS[name].num_blocks[KINDS.index(kind)]
        held = blueprint.held(kind, layer)
        blocks = torch.zeros(num_full, dtype=torch.float64)
        blocks[list(held)] = (num_full / len(held)) ** 0.5
        output = full.get_submodule(LAYOUTS[name].outputs[kind].format(layer=layer))
        inputs: Any = output.nx if hasattr(output, "nx") else output.in_features
        return blocks.repeat_interleave(inputs // num_full)

    full = with_state(plain_model(name), state)
    attach_factors(full, LAYOUTS[name], mask)
    return full


def gradients(model: PreTrainedModel) -> tuple[torch.Tensor, State]:
    logits = model(tokens(), use_cache=False).logits
    # Random weights on the logits: every one of them counts, and no symmetry hides an error.
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(name: str, ours: State, theirs: State) -> None:
    """In float64; a norm of keys, which is in float32, sees a key once for every query head."""
    most = 1e-6 if name == "qwen3 heads" else 1e-10
    for key, grad in theirs.items():
        assert (ours[key] - grad).abs().max() <= most * max(1.0, float(grad.abs().max())), key


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


# The table


def test_every_architecture_of_the_table_has_its_class_can_be_chosen_and_is_tested() -> None:
    assert list(ARCHITECTURE.own) == FAMILIES
    assert [use_architecture(name).model_type for name in FAMILIES] == FAMILIES


@every_model
def test_names_shapes_and_order_are_the_real_models(name: str) -> None:
    real = {key: tuple(parameter.shape) for key, parameter in plain_model(name).named_parameters()}
    assert [(param.name, param.shape) for param in LAYOUTS[name].params] == list(real.items())


@every_model
def test_counts_and_shapes_of_a_subnet_are_the_real_models(name: str) -> None:
    layout, blueprint = LAYOUTS[name], ticket(name)
    model = build_model(CONFIGS[name], layout, blueprint, "sqrt")
    layout.check_names({key: tuple(p.shape) for key, p in model.named_parameters()}, blueprint)
    assert layout.num_params(blueprint) == sum(parameter.numel() for parameter in model.parameters())
    assert layout.num_params(blueprint) < layout.num_params()
    assert layout.num_params() == sum(parameter.numel() for parameter in plain_model(name).parameters())


@every_model
def test_every_projection_of_a_divided_layer_is_divided(name: str) -> None:
    """No linear module inside a layer stays whole but shared keys and values; output biases and norms do."""
    layer = [param for param in LAYOUTS[name].params if param.layer == 1]
    whole = {param.name for param in layer if param.kind is None and not param.is_shared}
    assert any(param.is_shared for param in layer) == (name in OF_HEADS)
    outputs = {LAYOUTS[name].outputs[kind].format(layer=1) + ".bias" for kind in KINDS}
    assert all(key in outputs or re.search(r"norm|\.ln_", key) for key in whole)


@every_family
def test_an_attention_block_is_one_key_value_group(name: str) -> None:
    """Block 2's slice of the full matrices, as the model itself views them: naive, without the table's index."""
    layout, model = LAYOUTS[name], plain_model(name)
    blueprint = Blueprint(layout.num_blocks, ((2,),) * LAYERS, ((0,),) * LAYERS)
    sliced = slice_state(layout, get_state(model), blueprint)
    d_head, groups = layout.sizes["d_head"], layout.sizes["d_query"] // layout.sizes["d_head"]
    named = {key: value for key, value in get_state(model).items() if "1.attn" in key or "1.self_attn" in key}
    named |= {key: value for key, value in get_state(model).items() if ".1.attention" in key}
    for key, full in named.items():
        if re.search(r"(q|k|v)_proj\.", key):
            width = d_head * (groups if "q_proj" in key else 1)
            assert torch.equal(sliced[key], full[2 * width : 3 * width]), key
        elif "query_key_value" in key:
            by_head = full.view(layout.sizes["heads"], 3, d_head, *full.shape[1:])
            assert torch.equal(sliced[key], by_head[2].flatten(0, 1)), key
        elif key.endswith("c_attn.weight"):
            by_head = full.view(-1, 3, layout.sizes["heads"], d_head)
            assert torch.equal(sliced[key], by_head[:, :, 2].flatten(1)), key


# Masked = physical, whole = plain


@every_model
def test_a_subnet_is_the_masked_model(name: str, random_state: RandomState) -> None:
    layout, blueprint = LAYOUTS[name], ticket(name)
    state = random_state(layout, dtype=torch.float64)
    ours, our_grads = gradients(physical_model(name, state, blueprint))
    theirs, their_grads = gradients(masked_model(name, state, blueprint))
    assert relative(ours, theirs) < 1e-10
    assert relative(ours, plain_logits(name, state)) > 1e-3
    sliced = slice_state(layout, their_grads, blueprint)
    assert our_grads.keys() == sliced.keys() == layout.by_name.keys()
    assert_close_gradients(name, our_grads, sliced)


def plain_logits(name: str, state: State) -> torch.Tensor:
    logits: torch.Tensor = with_state(plain_model(name), state)(tokens()).logits
    return logits


@every_model
def test_the_full_blueprint_is_the_plain_model_bit_for_bit(name: str, random_state: RandomState) -> None:
    state = random_state(LAYOUTS[name])
    model = physical_model(name, state, full_blueprint(LAYOUTS[name]))
    assert torch.equal(model(tokens()).logits, plain_logits(name, state))


@every_model
def test_folding_the_scale_replaces_the_hooks(name: str, random_state: RandomState) -> None:
    layout, blueprint = LAYOUTS[name], ticket(name)
    state = random_state(layout, dtype=torch.float64)
    folded = with_state(
        build_model(CONFIGS[name], layout, blueprint, "none"), fold_scale(layout, state, blueprint, "sqrt")
    )
    assert not any(module._forward_pre_hooks for module in folded.modules())
    assert relative(folded(tokens()).logits, physical_model(name, state, blueprint)(tokens()).logits) < 1e-10


@every_model
def test_what_a_round_sends_out_comes_back_bit_for_bit(name: str, random_state: RandomState) -> None:
    layout, division = LAYOUTS[name], Division("both", ((3, 3), (3, 3), (2, 4)), 1, 0)
    state = random_state(layout)
    mean = StreamingMean(layout, {key: torch.zeros_like(value) for key, value in state.items()})
    for blueprint in draw_round(layout, division, seed=0, round_=1):
        mean.add(blueprint, slice_state(layout, state, blueprint))
    back = mean.finish()  # every block had a holder
    assert all(torch.equal(back[key], state[key]) for key in state)


# Running it


@every_model
def test_whole_windows_need_no_mask_and_no_whole_logits(name: str, random_state: RandomState) -> None:
    """Our attention interface and chunked loss against Hugging Face's own paths."""
    state, blueprint = random_state(LAYOUTS[name]), ticket(name)
    ours = ModelCache(CONFIGS[name], LAYOUTS[name], "sqrt").load_sliced(blueprint, state).train(False)
    theirs = physical_model(name, state, blueprint)
    logits = theirs(tokens(), use_cache=False).logits
    assert torch.equal(ours(tokens(), use_cache=False).logits, logits)
    theirs.set_attn_implementation("eager")
    assert relative(theirs(tokens(), use_cache=False).logits, logits) < 1e-5
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert relative(next_token_loss(ours, tokens()), expected) < 1e-6
    assert relative(next_token_loss(ours, tokens(), chunk=7), expected) < 1e-6


@every_model
def test_a_kv_cache_changes_nothing_and_is_as_large_as_planned(name: str, random_state: RandomState) -> None:
    """Layers with fewer blocks have narrower caches."""
    layout, blueprint = LAYOUTS[name], ticket(name)
    model = ticket_model(make_ticket(layout, random_state(layout), CONFIGS[name].to_dict(), blueprint, "sqrt"))
    prompt = tokens(4)[:1]
    with_cache, without = (
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=8,
            use_cache=use,
            pad_token_id=0,
        )
        for use in (True, False)
    )
    assert with_cache.shape == (1, CONTEXT)
    assert torch.equal(with_cache, without)
    with torch.inference_mode():
        cache = model(tokens()[:1], use_cache=True).past_key_values
    layers = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert layers[1] == layers[2] == layers[0] * 3 // layout.num_blocks[0]
    assert sum(layers) + sum(p.nbytes for p in model.parameters()) == ticket_memory_bytes(layout, blueprint)


@every_model
def test_a_lent_state_is_trained_as_a_copy_is(name: str, random_state: RandomState) -> None:
    """Bit for bit, tied heads too; then the model has memory of its own again."""
    lent, copied = (ModelCache(CONFIGS[name], LAYOUTS[name], "sqrt") for _ in range(2))
    batches, config = [tokens()] * 2, TrainConfig(lr=1e-2)
    for draw in (0, 1):
        blueprint = ticket(name, draw)
        state = slice_state(LAYOUTS[name], random_state(LAYOUTS[name], draw), blueprint)
        expected = train_interval(copied.load(blueprint, state), batches, config, 0).result
        model: Any = lent.load(blueprint, state, in_place=True)
        head = model.get_output_embeddings().weight
        result = train_interval(model, batches, config, 0).result
        take_back(model)
        where = {key: value.data_ptr() for key, value in state.items()}
        assert {key: value.data_ptr() for key, value in result.items()} == where
        assert not {parameter.data_ptr() for parameter in model.parameters()} & set(where.values())
        assert all(torch.equal(state[key], value) for key, value in expected.items())
        assert model.get_output_embeddings().weight is head


@pytest.mark.parametrize("name", ["llama", "llama biased heads", "opt", "gpt_neox"])
def test_a_subnet_compiles_as_one_graph_once_per_shape(
    name: str, random_state: RandomState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is run as it is, which takes no compiler's time. Weights that are lent compile nothing either."""
    compilations: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compilations.append(1)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(ModelCache, "backend", staticmethod(backend))
    state, layout = random_state(LAYOUTS[name]), LAYOUTS[name]
    compiled, plain = (ModelCache(CONFIGS[name], layout, "sqrt", compile=choice) for choice in (True, False))
    for draw in (0, 1, 2):
        blueprint = ticket(name, draw)
        sliced = slice_state(layout, state, blueprint)
        losses = [
            next_token_loss(models.load(blueprint, sliced, in_place=draw > 0).train(False), tokens(), chunk=7)
            for models in (compiled, plain)
        ]
        assert relative(*losses) < 1e-6
    assert len(compilations) == 1


def test_the_padding_token_is_the_first_end_of_text() -> None:
    assert padding_token({"pad_token_id": 0, "eos_token_id": 2}) == 0
    assert padding_token({"pad_token_id": None, "eos_token_id": [7, 8]}) == 7
    assert padding_token({"eos_token_id": 2}) == 2
    assert padding_token({"eos_token_id": None}) is None


@every_model
def test_a_config_survives_json(name: str) -> None:
    """As it travels to workers and edge clients."""
    sent = CONFIGS[name].to_dict()
    received = config_from_dict(json.loads(json.dumps(sent)))
    assert type(received) is type(CONFIGS[name])
    assert received.to_dict() == sent
    assert layout_of(name, received.to_dict()) == LAYOUTS[name]


# Query heads as blocks


@st.composite
def heads_held(draw: st.DrawFn) -> Blueprint:
    """Some or all of 8 query heads and of the FFN blocks, in each layer."""
    rows = [
        tuple(tuple(sorted(draw(st.sets(st.integers(0, num - 1), min_size=1)))) for _ in range(LAYERS))
        for num in (8, FFN_BLOCKS)
    ]
    return Blueprint((8, FFN_BLOCKS), *rows)


@settings(max_examples=12)
@given(blueprint=heads_held(), name=st.sampled_from(OF_HEADS))
def test_query_heads_are_one_function_in_training_masked_and_as_a_ticket(
    blueprint: Blueprint, name: str, random_state: RandomState
) -> None:
    """Gradients of keys and values, too; the warm model held the mirrored heads before."""
    layout, fields = LAYOUTS[name], CONFIGS[name].to_dict()
    state = random_state(layout, dtype=torch.float64)
    mirrored = replace(blueprint, attn=tuple(tuple(7 - head for head in reversed(held)) for held in blueprint.attn))
    models = ModelCache(CONFIGS[name], layout, "sqrt")
    with_state(models.warm(mirrored), slice_state(layout, state, mirrored))
    ours, our_grads = gradients(models.load_sliced(blueprint, state))
    theirs, their_grads = gradients(masked_model(name, state, blueprint))
    assert relative(ours, theirs) < 1e-10
    assert_close_gradients(name, our_grads, slice_state(layout, their_grads, blueprint))
    made = make_ticket(layout, state, fields, blueprint, "sqrt")
    config, own = config_from_dict(made.model_config), make_layout(made.model_config, FFN_BLOCKS)
    shipped = with_state(build_model(config, own, made.blueprint, "none"), made.params)
    assert relative(shipped(tokens()).logits, theirs) < 1e-10


@pytest.mark.parametrize("name", OF_HEADS)
def test_a_ticket_of_query_heads_has_kv_groups_or_a_copy_for_each_head(name: str, random_state: RandomState) -> None:
    """With all heads it is the ticket of KV groups, to the last bit."""
    layout, fields, state = LAYOUTS[name], CONFIGS[name].to_dict(), random_state(LAYOUTS[name])
    grouped, whole = make_layout(fields, FFN_BLOCKS), full_blueprint(layout)
    for blueprint in (whole, replace(whole, ffn=((0, 2),) * LAYERS)):
        own, held = layout.own_keys(blueprint)
        assert (own, held) == (grouped, replace(full_blueprint(grouped), ffn=blueprint.ffn))
        ours, theirs = (make_ticket(each, state, fields, b, "sqrt") for each, b in ((layout, blueprint), (own, held)))
        assert ours.digest == theirs.digest
    copied = make_layout(fields | {"num_key_value_heads": 8}, FFN_BLOCKS)
    assert layout.own_keys(ticket(name)) == (copied, ticket(name))
    assert grouped.own_keys(full_blueprint(grouped)) == (grouped, full_blueprint(grouped))


def test_query_heads_are_blocks_wherever_each_has_its_own_keys() -> None:
    assert make_layout(CONFIGS["gpt_neox"].to_dict(), FFN_BLOCKS, "heads") == LAYOUTS["gpt_neox"]
    assert make_layout(CONFIGS["llama"].to_dict() | {"intermediate_size": 16}, None, "heads").num_blocks == (8, 8)


# Refusals

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sliding window": ("mistral", {"sliding_window": 8}, "sliding_window=8 and a context of 12 .* sliding_window=null"),
    "sliding layers": ("qwen3", {"use_sliding_window": True, "sliding_window": 4}, "sliding_window=4 and a context"),
    "odd heads": ("llama", {"head_dim": 5}, "heads of 5 entries"),
    "unequal groups": ("qwen2", {"num_key_value_heads": 3}, r"3 key/value heads .* use one of \[1, 2, 4, 8\]"),
    "layerdrop": ("opt", {"layerdrop": 0.1}, "layerdrop=0.1 trains some layers only sometimes"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "no causal language model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_exact_is_refused(case: str) -> None:
    name, change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_layout(CONFIGS[name].to_dict() | change, FFN_BLOCKS)


def test_query_heads_that_cannot_be_told_from_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = Row("model.layers.{layer}.self_attn.qkv_proj.weight", (Blocks("attn", "d_qkv"), "d_model"))
    monkeypatch.setitem(architectures._KNOWN, "llama", replace(use_architecture("llama"), rows=(fused,)))
    reason = r"attn_blocks=heads: .*qkv_proj\.weight of 'llama' does not have queries apart .*: use kv_groups"
    with pytest.raises(ValueError, match=reason):
        make_layout(CONFIGS["llama"].to_dict(), FFN_BLOCKS, "heads")


def test_a_sliding_window_as_long_as_the_context_is_no_window(random_state: RandomState) -> None:
    fields, state = CONFIGS["mistral"].to_dict() | {"sliding_window": CONTEXT}, random_state(LAYOUTS["mistral"])
    assert make_layout(fields, FFN_BLOCKS) == LAYOUTS["mistral"]
    model = AutoModelForCausalLM.from_config(config_from_dict(fields))  # type: ignore[no-untyped-call]
    assert torch.equal(with_state(model, state)(tokens()).logits, plain_logits("mistral", state))


# A run


@every_family
def test_a_model_from_scratch_is_trained_and_rebuilt(name: str, tiny_job: Callable[..., Job], tmp_path: Path) -> None:
    """A round of a job as the server and its workers hold it; then the same from a checkpoint of that model."""
    grouped = ["model.n_head=8", "model.n_kv_head=4"] if "n_kv_head" in use_architecture(name).keys else []
    overrides = (f"model.architecture={name}", "model.n_inner=48", "model.dropout=0.1", *grouped)
    job = tiny_job(*overrides, "blueprint.ffn_blocks=4", "train.rounds=1")
    assert job.layout.num_blocks == (4, 4)
    assert job.model_config.model_type == name
    assert (job.layout.sizes["positions"], job.layout.sizes["d_inner"]) == (32, 48)
    worker_job = job_from_json(job.to_json())
    assert worker_job.model_config.to_dict() == job.model_config.to_dict()
    assert worker_job.layout == job.layout
    before, after = start(job).params, run(worker_job, start(worker_job), tmp_path / "run").params
    assert all(not torch.equal(after[key], before[key]) for key in before)
    model = AutoModelForCausalLM.from_config(job.model_config)  # type: ignore[no-untyped-call]
    load_state(model, after)
    model.save_pretrained(tmp_path / "checkpoint")
    copy_tokenizer(job.corpus.tokenizer_folder, tmp_path / "checkpoint")
    again = tiny_job(*overrides[:1], f"model.pretrained={tmp_path / 'checkpoint'}", "blueprint.ffn_blocks=4")
    found = again.initial_state()
    assert again.layout == job.layout
    assert all(torch.equal(found[key], after[key]) for key in after)


IMPOSSIBLE = {
    "model.n_kv_head=3": r"3 key/value heads \(model.n_kv_head\) do not divide 4 heads: use one of \[1, 2, 4\]",
    "model.n_embd=12": "a 'llama' model with heads of 3 entries",
    "model.architecture=opt": r"model.n_kv_head=2: every head of model.architecture=opt .* use one of llama, mistral,",
    "blueprint.num_sub=3": "blueprint.num_sub=3 of a layer's 2 blocks is impossible: choose 1 to 2",
}


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_impossible_sizes_are_refused(change: str, tiny_job: Callable[..., Job]) -> None:
    with pytest.raises(ConfigError, match=IMPOSSIBLE[change]):
        tiny_job("model.architecture=llama", "model.n_kv_head=2", change)


def test_a_checkpoint_of_an_unknown_architecture_is_refused(tiny_job: Callable[..., Job], tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model_type 'bert' has no block table; known: gpt2, llama, mistral, "):
        tiny_job(f"model.pretrained={tmp_path}")


# Tickets

ISOLATED = """
import sys
sys.modules["twist_fl"] = None
import warnings
warnings.simplefilter("error")
import torch
from transformers import AutoModelForCausalLM
out, *folders = sys.argv[1:]
found = {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert "twist_fl" not in type(model).__module__
    prompt = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones_like(prompt)
    made = [
        model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=8, use_cache=cache).tolist()
        for cache in (True, False)
    ]
    assert made[0] == made[1], (folder, made)
    with torch.inference_mode():
        found[folder] = model(torch.arange(3, 12)[None]).logits
torch.save(found, out)
"""


def test_tickets_run_where_twist_fl_is_not_installed(random_state: RandomState, tmp_path: Path) -> None:
    expected = {}
    for number, name in enumerate([*FAMILIES, *OF_HEADS]):
        state, blueprint, folder = random_state(LAYOUTS[name]), ticket(name), tmp_path / f"ticket-{number}"
        fields = CONFIGS[name].to_dict() | {"pad_token_id": 0}
        made = make_ticket(LAYOUTS[name], state, fields, blueprint, "sqrt")
        export_ticket(made, folder, None)
        expected[str(folder)] = physical_model(name, state, blueprint)(torch.arange(3, 12)[None]).logits
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED, str(tmp_path / "out.pt"), *expected],
        env=quiet_environment(str(tmp_path), 1) | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = torch.load(tmp_path / "out.pt")
    assert found.keys() == expected.keys()
    assert all(relative(found[key], expected[key]) < 1e-5 for key in found)


@pytest.mark.parametrize(
    ("key", "size"), [("n_head", None), ("n_layer", 0), ("n_embd", "32"), ("n_positions", True), ("vocab_size", 2**30)]
)
def test_a_size_that_no_model_has_is_refused(key: str, size: object) -> None:
    """As in a message, or a file that was harmed: nobody lays out parameters that no memory holds."""
    with pytest.raises(ValueError, match=f"^{key}="):
        make_layout(CONFIGS["gpt2"].to_dict() | {key: size})
    if size is None:
        with pytest.raises(ValueError, match=f"^{key}=None"):
            make_layout({name: value for name, value in CONFIGS["gpt2"].to_dict().items() if name != key})
