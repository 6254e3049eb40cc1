"""Deployment without Flower: the planner, the ticket, the exported folder, the edge client's measurements."""

import itertools
import json
import subprocess
import sys
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.config.devices import DeviceConfig
from twist_fl.config.schema import load_config
from twist_fl.config.sizes import TicketSize, ticket_sizes
from twist_fl.data.tokenizer import train_tokenizer
from twist_fl.model.hf_config import model_config
from twist_fl.model.subnet import ModelCache, State, get_state, slice_state
from twist_fl.system.errors import ConfigError
from twist_fl.tickets import edge_client, export
from twist_fl.tickets.edge_client import EdgeReport, Measurement, decode, measure, measure_here
from twist_fl.tickets.evaluate import perplexity
from twist_fl.tickets.export import (
    Ticket,
    export_ticket,
    make_ticket,
    next_sizes,
    plan_tickets,
    ticket_digest,
    ticket_memory_bytes,
)
from twist_fl.tickets.measuring import quiet_environment
from twist_fl.tickets.parts import Shelf, parts_of, put_together, take_parts

CONFIG = GPT2Config(
    vocab_size=300, n_positions=32, n_embd=24, n_layer=5, n_head=6, n_inner=72, bos_token_id=0, eos_token_id=0
)
FIELDS = CONFIG.to_dict()
LAYOUT = make_layout(FIELDS, ffn_blocks=12)
SUBNETS = {"half": (3, 4), "one": (1, 1), "full": (6, 12)}


def division(setting: str = "both", first: int = 1, last: int = 1) -> Division:
    return Division(setting, ((3, 6),) * 2, first, last)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    # Large random values, biases too: with the model's own initialisation a wrong scale would hardly show.
    return {name: 0.2 * torch.randn(value.shape) for name, value in get_state(GPT2LMHeadModel(CONFIG)).items()}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 9, 300).save_pretrained(folder)
    (folder / "model.safetensors").write_text("not a tokenizer file")
    return folder


def ticket_of(state: State, num_sub: tuple[int, int], scale: str = "sqrt") -> Ticket:
    blueprint = draw_ticket(LAYOUT, division(), num_sub, seed=1, draw=0)
    return make_ticket(LAYOUT, state, FIELDS, blueprint, scale)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def modules_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """transformers copies the model code of a ticket it loads: not into the user's cache."""
    folder = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def half(state: State, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ticket, Path]:
    ticket, folder = ticket_of(state, SUBNETS["half"]), tmp_path_factory.mktemp("half") / "ticket"
    export_ticket(ticket, folder, None)
    return ticket, folder


@pytest.fixture(scope="module", params=SUBNETS)
def exported(
    request: pytest.FixtureRequest, state: State, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Ticket, Path]:
    ticket = ticket_of(state, SUBNETS[request.param])
    folder = tmp_path_factory.mktemp("tickets") / "my-ticket.0"
    export_ticket(ticket, folder, tokenizer_folder)
    return ticket, folder


def windows(num: int = 3, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (num, width), dtype=np.int32)


def test_a_ticket_is_no_start_of_a_run(exported: tuple[Ticket, Path]) -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained='.*' is a ticket, .*: give the run it was drawn from"):
        model_config(load_config(overrides=[f"model.pretrained={exported[1]}"]))


# The planner


def test_memory_is_float32_weights_and_the_cache_of_one_context() -> None:
    blueprint = draw_ticket(LAYOUT, division(), (3, 4), seed=0, draw=0)
    model = ModelCache(CONFIG, LAYOUT, "sqrt").load_sliced(blueprint, get_state(GPT2LMHeadModel(CONFIG)))
    with torch.inference_mode():
        cache = model(torch.zeros(1, 32, dtype=torch.int64), use_cache=True).past_key_values
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert ticket_memory_bytes(LAYOUT, blueprint) == weight_bytes + cache_bytes


def plan(
    divided: Division, memory_bytes: float, seed: int = 0, draw: int = 0, *, layout: Layout = LAYOUT, kappa: float = 1
) -> Blueprint:
    """The largest ticket for a device of so much memory, which may hold that share of blocks."""
    tickets = plan_tickets(layout, divided, DeviceConfig("watch", memory_bytes / 1e6, kappa=kappa), seed, draw)
    return next(iter(tickets.values()))


def brute_force(layout: Layout, divided: Division, memory_bytes: float, kappa: float) -> int | None:
    """Most blocks any ticket holds within the limits whose kinds have the share k of the larger one, to the nearest."""
    kinds = [i for i, kind in enumerate(KINDS) if divided.divides(kind)]
    most = max(layout.num_blocks[i] for i in kinds)
    fitting = []
    for num_sub in itertools.product(range(1, layout.num_blocks[0] + 1), range(1, layout.num_blocks[1] + 1)):
        legal = any(
            all(
                max(1, floor(k * of / most + 0.5)) == n if i in kinds else n == of
                for i, (n, of) in enumerate(zip(num_sub, layout.num_blocks, strict=True))
            )
            for k in range(1, most + 1)
        )
        blueprint = draw_ticket(layout, divided, num_sub, seed=9, draw=9)
        kept = max(num_sub[i] / layout.num_blocks[i] for i in kinds)
        if legal and ticket_memory_bytes(layout, blueprint) <= memory_bytes and kept <= kappa:
            fitting.append(sum(map(sum, blueprint.shape)))
    return max(fitting, default=None)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["attn", "ffn", "both"]),
    st.sampled_from([1, 4, 6, 12, 72]),
    st.floats(0, 1.1),
    st.sampled_from([1 / 12, 0.3, 0.5, 2 / 3, 1]),
)
def test_the_plan_is_the_largest_ticket_that_fits(setting: str, ffn_blocks: int, share: float, kappa: float) -> None:
    layout, divided = make_layout(FIELDS, ffn_blocks), division(setting)
    memory_bytes = share * ticket_memory_bytes(layout, full_blueprint(layout))
    expected = brute_force(layout, divided, memory_bytes, kappa)
    if expected is None:
        with pytest.raises(ConfigError, match="smallest possible"):
            plan(divided, memory_bytes, layout=layout, kappa=kappa)
    else:
        planned = plan(divided, memory_bytes, layout=layout, kappa=kappa)
        assert sum(map(sum, planned.shape)) == expected
        assert ticket_memory_bytes(layout, planned) <= memory_bytes


def test_more_memory_never_gives_a_smaller_ticket() -> None:
    full = ticket_memory_bytes(LAYOUT, full_blueprint(LAYOUT))
    least = ticket_memory_bytes(LAYOUT, draw_ticket(LAYOUT, division(), (1, 2), 0, 0))
    planned = [plan(division(), memory) for memory in np.linspace(least, full, 40)]
    sizes = [LAYOUT.num_params(blueprint) for blueprint in planned]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 11  # of 12: all but the smallest
    assert planned[-1] == full_blueprint(LAYOUT)


def test_a_plan_is_a_function_of_seed_and_draw() -> None:
    memory_bytes = ticket_memory_bytes(LAYOUT, draw_ticket(LAYOUT, division(), (3, 6), 0, 0))
    assert plan(division(), memory_bytes, 0, 1) == plan(division(), memory_bytes, 0, 1)
    draws = itertools.product(range(3), range(3))
    assert len({plan(division(), memory_bytes, seed, draw) for seed, draw in draws}) == 9


def test_a_device_too_small_is_refused_and_the_size_named_is_enough() -> None:
    with pytest.raises(ConfigError, match=r"'watch': memory_mb=0\.05 .* needs \d\.\d+ MB") as refusal:
        plan(division(), 0.05e6)
    named_mb = float(str(refusal.value).rpartition("=")[2])
    assert plan(division(), named_mb * 1e6).shape[0] == (6, 1, 1, 1, 6)


def test_a_share_too_small_is_refused_and_the_one_named_is_enough() -> None:
    reason = r"'watch': kappa=0\.1 .* holds 1/6\+1/12 of a layer: use at least"
    with pytest.raises(ConfigError, match=reason) as refusal:
        plan(division(), 1e9, kappa=0.1)
    named = float(str(refusal.value).rpartition("=")[2])
    assert plan(division(), 1e9, kappa=named).shape[0] == (6, 1, 1, 1, 6)


def test_without_a_limit_there_is_a_ticket_of_every_size() -> None:
    planned = plan_tickets(LAYOUT, division(), DeviceConfig("laptop", latency_ms=1), seed=0)
    assert list(planned) == ticket_sizes(LAYOUT, division())[::-1]
    assert next(iter(planned.values())) == full_blueprint(LAYOUT)
    assert [(len(ticket.attn[1]), len(ticket.ffn[1])) for ticket in planned.values()] == [
        size.num_sub for size in planned
    ]


@given(st.sets(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 40), st.integers(0, 9), st.integers(1, 400))
def test_a_slow_device_ends_with_the_largest_size_that_is_fast_enough(
    legal: set[int], constant: int, slope: int, limit: int
) -> None:
    sizes = [TicketSize((size, size), (40, 40), "both") for size in sorted(legal, reverse=True)]
    expected = next((size for size in sorted(legal, reverse=True) if constant + slope * size <= limit), None)
    tried: list[int] = []
    while sizes and (not tried or constant + slope * tried[-1] > limit):
        tried.append(sizes[0].num_sub[0])
        sizes = next_sizes(sizes, constant + slope * tried[-1], limit)
    assert tried[-1] == (min(legal) if expected is None else expected)
    assert tried == sorted(set(tried), reverse=True)


# The ticket


def test_num_params_and_sizes_are_the_blueprints(state: State) -> None:
    ticket = ticket_of(state, (3, 4))
    assert ticket.num_params == LAYOUT.num_params(ticket.blueprint)
    assert ticket.model_config["heads_per_layer"] == [6, 3, 3, 3, 6]
    assert ticket.model_config["neurons_per_layer"] == [72, 24, 24, 24, 72]
    assert export.keep(ticket.blueprint) == {"attn": 1 / 2, "ffn": 1 / 3}


def test_the_digest_is_of_every_byte_and_of_no_order(state: State) -> None:
    ticket = ticket_of(state, (3, 4))
    blueprint, config, params = ticket.blueprint.to_json(), ticket.config_json, ticket.params
    assert ticket.digest == ticket_digest(blueprint, config, dict(reversed(params.items())))
    name = "transformer.h.2.mlp.c_proj.weight"
    nudged = params[name].clone()
    nudged[3, 5] = torch.nextafter(nudged[3, 5], torch.tensor(9.0))
    others = [
        ticket_digest(blueprint + " ", config, params),
        ticket_digest(blueprint, config + " ", params),
        ticket_digest(blueprint, config, params | {name: nudged}),
        ticket_digest(blueprint, config, params | {name: params[name].reshape(-1)}),
        ticket_digest(blueprint, config, params | {name: params[name].view(torch.int32)}),
        ticket_digest(blueprint, config, {key + "x" * (key == name): value for key, value in params.items()}),
    ]
    assert len({ticket.digest, *others}) == 7


def test_labels_with_integer_keys_do_not_change_the_digest(state: State) -> None:
    fields = FIELDS | {"id2label": {i: f"label {i}" for i in range(12)}}
    ticket = make_ticket(LAYOUT, state, fields, full_blueprint(LAYOUT), "sqrt")
    sent = json.loads(ticket.config_json)
    assert ticket.digest == ticket_digest(ticket.blueprint.to_json(), json.dumps(sent, sort_keys=True), ticket.params)


def test_parts_put_together_are_the_slice(state: State) -> None:
    for size in SUBNETS.values():
        blueprint = ticket_of(state, size).blueprint
        names = dict(parts_of(LAYOUT, blueprint))
        parts = take_parts(LAYOUT, state, names)
        assert {name: tuple(part.shape) for name, part in parts.items()} == names
        made, expected = put_together(LAYOUT, blueprint, parts), slice_state(LAYOUT, state, blueprint)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)


def test_a_shelf_keeps_parts_of_one_state_and_drops_what_is_damaged(state: State, tmp_path: Path) -> None:
    blueprint = ticket_of(state, (3, 4)).blueprint
    names = [name for name, _ in parts_of(LAYOUT, blueprint)]
    shelf = Shelf(tmp_path, "a")
    assert shelf.missing(LAYOUT, blueprint) == names
    for some in (names[:5], names[5:]):
        shelf.put(LAYOUT, blueprint, take_parts(LAYOUT, state, some))
    assert Shelf(tmp_path, "a").missing(LAYOUT, blueprint) == []
    first = min((tmp_path / "a").iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    assert shelf.missing(LAYOUT, blueprint) == names[:5]
    assert Shelf(tmp_path, "b").missing(LAYOUT, blueprint) == names
    assert not (tmp_path / "a").exists()
    for name, part in (("transformer.wte.bias", torch.zeros(3)), (names[0], torch.zeros(3))):
        with pytest.raises(ValueError, match=f"part '{name}' of shape \\(3,\\) is none of the ticket's"):
            shelf.put(LAYOUT, blueprint, {name: part})


def test_no_code_that_a_message_names_is_run(state: State, tmp_path: Path) -> None:
    fields = FIELDS | {"auto_map": {"AutoModelForCausalLM": "someone/else--code.Model", "AutoConfig": "code.Config"}}
    ticket = make_ticket(LAYOUT, state, fields, full_blueprint(LAYOUT), "sqrt")
    export_ticket(ticket, tmp_path / "ticket", None)
    written = json.loads((tmp_path / "ticket" / "config.json").read_text())
    assert written["auto_map"] == {
        "AutoConfig": "modeling_subnet.SubnetGPT2Config",
        "AutoModelForCausalLM": "modeling_subnet.SubnetGPT2LMHeadModel",
    }


# The exported folder

ISOLATED = """
import sys
sys.modules["twist_fl"] = None
import warnings
warnings.simplefilter("error")
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
assert "twist_fl" not in type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("the cat sat", return_tensors="pt")
made = [model.generate(**inputs, do_sample=False, max_new_tokens=12, use_cache=c).tolist() for c in (True, False)]
with torch.inference_mode():
    logits = model(torch.arange(40, 72)[None]).logits
torch.save({"logits": logits, "generated": made, "prompt": inputs["input_ids"].tolist()}, out)
print(type(model).__name__)
"""


def run_isolated(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "",
        "HOME": str(out.parent),
        "HF_MODULES_CACHE": str(out.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", ISOLATED, str(folder), str(out)]
    return subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("exported", ["half"], indirect=True)
def test_a_ticket_runs_where_twist_fl_is_not_installed(
    exported: tuple[Ticket, Path], state: State, tokenizer_folder: Path, tmp_path: Path
) -> None:
    ticket, folder = exported
    done = run_isolated(folder, tmp_path / "out.pt")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["SubnetGPT2LMHeadModel"]
    got = torch.load(tmp_path / "out.pt")
    with_cache, without_cache = got["generated"]
    assert with_cache == without_cache
    assert len(with_cache[0]) > len(got["prompt"][0])
    assert got["prompt"][0] == AutoTokenizer.from_pretrained(tokenizer_folder)("the cat sat")["input_ids"]
    expected = logits_of(ModelCache(CONFIG, LAYOUT, "sqrt").load_sliced(ticket.blueprint, state))
    assert relative_error(got["logits"], expected) < 1e-5


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(40, 72)[None]).logits
    return logits


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("scale", ["linear", "none"])
def test_every_scale_is_folded_into_the_weights(scale: str, state: State, tmp_path: Path) -> None:
    ticket = ticket_of(state, (3, 4), scale)
    export_ticket(ticket, tmp_path / "ticket", None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ticket", trust_remote_code=True)
    expected = ModelCache(CONFIG, LAYOUT, scale).load_sliced(ticket.blueprint, state)  # type: ignore[arg-type]
    assert relative_error(logits_of(model), logits_of(expected)) < 1e-5
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_full_ticket_is_the_plain_model_too(state: State, tmp_path: Path) -> None:
    export_ticket(ticket_of(state, (6, 12)), tmp_path / "ticket", None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ticket")
    assert type(plain).__module__ == GPT2LMHeadModel.__module__
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "ticket", trust_remote_code=True)
    assert torch.equal(logits_of(plain), logits_of(trusted))


def test_a_smaller_ticket_without_its_code_is_an_error_not_a_wrong_model(state: State, tmp_path: Path) -> None:
    export_ticket(ticket_of(state, (3, 4)), tmp_path / "ticket", None)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ticket")


def test_the_folder_holds_the_ticket_and_nothing_else(exported: tuple[Ticket, Path]) -> None:
    ticket, folder = exported
    model_files = {"config.json", "generation_config.json", "model.safetensors", "modeling_subnet.py", "twist.json"}
    others = {"requirements.txt", "tokenizer.json", "tokenizer_config.json", "SHA256SUMS"}
    assert {file.name for file in folder.iterdir()} == model_files | others
    assert (folder / "requirements.txt").read_text() == "torch\ntransformers>=4.46,<6\n"
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (folder / "model.safetensors").stat().st_size == header + 4 * ticket.num_params


# The edge client


def test_decoding_steps_give_what_generate_gives(exported: tuple[Ticket, Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=True)
    prompt = torch.tensor(windows()[:1, :8], dtype=torch.int64)
    tokens, seconds = decode(model, prompt, 10)
    with torch.inference_mode():
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=11, do_sample=False, eos_token_id=299
        )
    assert (prompt[0].tolist() + tokens)[: generated.shape[1]] == generated[0].tolist()
    assert len(seconds) == 10
    assert min(seconds) > 0


def test_measure_reports_what_a_fresh_process_saw(
    half: tuple[Ticket, Path], state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ticket, folder = half
    monkeypatch.chdir(tmp_path)
    report = measure(folder, windows(), Measurement(4))
    expected = perplexity(ModelCache(CONFIG, LAYOUT, "sqrt").load_sliced(ticket.blueprint, state), windows(), 2)
    assert report.perplexity == pytest.approx(expected, rel=1e-5)
    assert (report.num_params, report.weight_bytes) == (ticket.num_params, 4 * ticket.num_params)
    assert (report.context_tokens, report.threads) == (32, 1)
    assert 0 < report.seconds_per_token < 1 < report.prompt_tokens_per_second
    assert report.peak_memory_bytes <= report.perplexity_memory_bytes < 500e6
    assert list(tmp_path.iterdir()) == []


def test_a_ticket_that_is_too_slow_to_stay_is_not_measured_further(half: tuple[Ticket, Path]) -> None:
    threads = torch.get_num_threads()
    try:
        slow, fast = (measure_here(half[1], windows(), Measurement(2, latency_ms=limit)) for limit in (1e-9, 1e9))
    finally:
        torch.set_num_threads(threads)
    assert slow.perplexity is None
    assert slow.seconds_per_token > 0
    assert fast.perplexity is not None


def test_a_failed_measurement_shows_why(half: tuple[Ticket, Path]) -> None:
    with pytest.raises(RuntimeError, match=r"exit status 1: [\s\S]*new_tokens=32 does not fit .* 32: use 1 to 31"):
        measure(half[1], windows(), Measurement(32))


def test_a_short_window_is_a_short_prompt(half: tuple[Ticket, Path]) -> None:
    threads = torch.get_num_threads()
    try:
        report = measure_here(half[1], windows(2, 8), Measurement(3))
    finally:
        torch.set_num_threads(threads)
    assert report.context_tokens == 8 + 3


def test_peak_memory_grows_with_what_was_touched_and_not_with_the_parents() -> None:
    code = (
        "import sys; sys.modules['flwr'] = None; from twist_fl.system import memory; before = memory.start_peak(); "
        "held = bytearray(b'x' * 50_000_000); print(memory.peak_bytes() - before)"
    )
    ballast = bytearray(b"x" * 300_000_000)
    environment = quiet_environment("", 1)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    del ballast
    assert 45e6 < int(done.stdout) < 150e6


def test_the_edge_client_needs_no_flower() -> None:
    code = "import sys; sys.modules['flwr'] = None; import twist_fl.tickets.edge_client"
    subprocess.run([sys.executable, "-c", code], env=quiet_environment("", 1), check=True)


def test_the_report_is_plain_json(
    half: tuple[Ticket, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "windows.npy", windows(1))
    threads = torch.get_num_threads()
    try:
        edge_client.main([str(half[1]), "--windows", str(tmp_path / "windows.npy"), "--new-tokens", "2"])
    finally:
        torch.set_num_threads(threads)
    report = EdgeReport(**json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert report.num_params == half[0].num_params
