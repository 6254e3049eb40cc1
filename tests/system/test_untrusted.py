"""Messages and folders from outside lead nowhere but where they may, and run nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from shipped import ship, whole_ticket
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.federation import shipping
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.model.saved import open_model
from twist_fl.pruning.methods import prune
from twist_fl.pruning.names import METHODS
from twist_fl.rounds import start
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.export import export_ticket, make_ticket
from twist_fl.training.job import Job, job_from_json

MakeJob = Callable[..., Job]
NAMES = ("../x", "/tmp/x", "", ".", "..", "a/b", "a\0b", "x" * 5000, "a\n")


@pytest.fixture
def content(tiny_job: MakeJob) -> tuple[Job, RecordDict]:
    job = tiny_job()
    return job, whole_ticket(job, full_blueprint(job.layout))


@pytest.mark.parametrize("name", NAMES)
def test_a_device_leads_nowhere_outside_its_folder(
    name: str, content: tuple[Job, RecordDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, records = content
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / "cache"))
    victim = tmp_path / "cache" / "tickets" / "x"
    victim.mkdir(parents=True)
    fields = json.loads(str(records.config_records["ticket"]["json"])) | {"device": name}
    records["ticket"] = ConfigRecord({"json": json.dumps(fields)})
    with pytest.raises(ConfigError, match="is no name for a folder"):
        shipping.receive(job, records)
    assert list(tmp_path.rglob("*")) == [tmp_path / "cache", victim.parent, victim]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["run_id", "corpus"])
def test_a_job_leads_nowhere_outside_the_cache(key: str, name: str, tiny_job: MakeJob) -> None:
    fields = json.loads(tiny_job().to_json())
    job_from_json(json.dumps(fields))
    with pytest.raises(ConfigError, match=f"^{key}: .* is no name for a folder"):
        job_from_json(json.dumps(fields | {key: name}))
    with pytest.raises(ValueError, match=f"{key}=5 is no str"):
        job_from_json(json.dumps(fields | {key: 5}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_with_weights_that_are_no_numbers_is_not_pruned(value: float, method: str, tiny_job: MakeJob) -> None:
    job = tiny_job()
    params = start(job).params
    params["transformer.h.1.mlp.c_fc.weight"][0, 0] = value
    with pytest.raises(ConfigError, match=r"^transformer\.h\.1\.mlp\.c_fc\.weight has values that are not finite"):
        prune(job, params, method, 2, seed=0, calibration_windows=4)


def test_a_ticket_pads_and_truncates_to_its_context(content: tuple[Job, RecordDict], tmp_path: Path) -> None:
    job, _ = content
    params = start(job).params
    ticket = make_ticket(job.layout, params, job.model_config.to_dict(), full_blueprint(job.layout), "sqrt")
    export_ticket(ticket, tmp_path / "ticket", job.corpus.tokenizer_folder)
    told = json.loads((tmp_path / "ticket" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "ticket")
    padded = tokenizer(["the worker", "a"], padding=True, return_tensors="pt")
    assert padded["attention_mask"].tolist()[1][-1] == 0
    assert len(tokenizer("the worker holds " * 500, truncation=True)["input_ids"]) == 32
    open_model(tmp_path / "ticket")


def test_a_folder_runs_no_code_unless_asked_to(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    code = (
        f"from pathlib import Path\nfrom transformers import GPT2LMHeadModel\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    )
    (tmp_path / "evil.py").write_text(code + "class Evil(GPT2LMHeadModel):\n    pass\n")
    open_model(tmp_path)
    assert not (tmp_path / "ran").exists()
    open_model(tmp_path, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_folder_whose_weights_do_not_fit_is_not_opened(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(GPT2Config(**config.to_dict() | {"n_layer": 2}).to_json_string())
    with pytest.raises(ConfigError, match=r"12 parameters are missing, for example transformer\.h\.1"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds no model that can be opened"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "{}", '{"num_params": true}', '{"missing": []}', '{"missing": ["x"]}', '{"missing": [[]]}'],
)
def test_a_report_that_is_none_is_named(text: str, content: tuple[Job, RecordDict]) -> None:
    job, _ = content
    answer = RecordDict({"report": ConfigRecord({"json": text})})
    with pytest.raises(NoWorkersError, match=r"^device phone sent a malformed report: (ValueError|JSONDecodeError)"):
        ship(job, lambda sent: answer, full_blueprint(job.layout))
