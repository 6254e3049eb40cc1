"""Whatever bytes come from outside: what reads them refuses them with its one kind of error, or gives what is valid.

Checkpoints, caches and messages are in `federation/test_mutations.py`; here is what is text, and a ticket's folder.
Every draw is seeded; TWIST_FL_FUZZ=10000 draws so many of each.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import fuzz_cases
from flwr.app import ConfigRecord
from shipped import whole_ticket

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.config.schema import from_yaml, load_config, to_yaml
from twist_fl.federation import shipping
from twist_fl.model.saved import open_model
from twist_fl.rounds import start
from twist_fl.runs.events import EventLog
from twist_fl.runs.story import Follower, lines, warnings
from twist_fl.system.errors import ConfigError, DamagedError
from twist_fl.system.files import SEAL
from twist_fl.tickets.export import export_ticket, make_ticket
from twist_fl.training.job import Job, job_from_json

MakeJob = Callable[..., Job]
WORDS = [
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"9" * 40,
        b'""',
        b"[]",
        b"{}",
        b"[" * 500,
        b"\0",
        b"\xff",
        b"\n",
    ),
    *(b'"x"', b"../../etc/passwd", b"!!python/object/apply:os.system [ls]", b"${oc.env:HOME}", b"&a [*a, *a]", b"?"),
]


def changed(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, doubled, moved or put in, once or a few times."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        match rng.choice(["byte", "byte", "word", "word", "cut", "drop", "twice", "random"]):
            case "byte":
                content = content[:i] + bytes([rng.randrange(256)]) + content[i + 1 :]
            case "word":
                content = content[:i] + rng.choice(WORDS) + content[min(j, i + rng.randrange(9)) :]
            case "cut":
                content = content[:j]
            case "drop":
                content = content[:i] + content[min(j, i + 30) :]
            case "twice":
                content = content[:j] + content[i:]
            case "random":
                content = content[:i] + rng.randbytes(rng.randint(1, 9)) + content[i:]
    return content


@dataclass(frozen=True)
class Format:
    content: bytes
    read: Callable[[bytes], object]
    """Checks itself that what it gives is valid."""
    refused: tuple[type[Exception], ...]


def read_blueprint(content: bytes) -> None:
    found = Blueprint.from_json(content.decode())
    assert Blueprint.from_json(found.to_json()) == found


def read_config(content: bytes) -> None:
    found = from_yaml(content.decode())
    assert from_yaml(to_yaml(found)) == found


def read_job(content: bytes) -> None:
    assert job_from_json(content.decode()).layout.params


def read_events(content: bytes, folder: Path) -> None:
    """Nothing is refused: lines that are none are passed over, and the rest is told."""
    (folder / "events.jsonl").write_bytes(content)
    follower = Follower(folder / "events.jsonl")
    for event in follower.look():
        assert all(isinstance(text, str) for text in (*warnings(event), *lines(event, follower.story)))


def some_events(folder: Path) -> bytes:
    log, sizes = EventLog(folder / "some.jsonl"), {"weights": 10, "moments": 0, "other": 5}
    log.write("start", round=0, algorithm="twist", num_rounds=3, num_params=10, subnet_params=[5, 6], workers=2)
    log.write("waiting", nodes=0, wanted=2)
    log.write("nodes", round=0, nodes=2, failed=["no room"], shared_memory=1)
    lost = {"1": "no reply within flower.round_timeout=1 s"}
    log.write("round", round=1, loss=2.5, seconds=0.5, dropped=lost, bytes_down=sizes, bytes_up=sizes, bytes_via={})
    log.write("eval", round=1, full=12.5, subnets=13.0)
    log.write("ticket", size="1/2", perplexity=3.0)
    log.write("failed", error="ValueError: x")
    return log.file.read_bytes()


@pytest.fixture(params=["blueprint", "config", "job", "event log", "ticket's message"])
def format_(
    request: pytest.FixtureRequest, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Format:
    job = tiny_job()
    match request.param:
        case "blueprint":
            return Format(job.blueprints(1)[0].to_json().encode(), read_blueprint, (ValueError,))
        case "config":
            return Format(to_yaml(load_config("demo")).encode(), read_config, (ConfigError, UnicodeDecodeError))
        case "job":
            return Format(job.to_json().encode(), read_job, (ValueError,))
        case "event log":
            return Format(some_events(tmp_path), lambda content: read_events(content, tmp_path), ())
        case _:
            return ticket_message(job, monkeypatch)


class Received(Exception):
    """A ticket has been written, and would be measured."""


def ticket_message(job: Job, monkeypatch: pytest.MonkeyPatch) -> Format:
    def measure(*given: object) -> None:
        raise Received

    monkeypatch.setattr("twist_fl.tickets.edge_client.measure", measure)
    records = whole_ticket(job, job.blueprints(1)[0])

    def read(content: bytes) -> None:
        records["ticket"] = ConfigRecord({"json": content.decode()})
        with pytest.raises(Received):
            shipping.receive(job, records)

    return Format(str(records.config_records["ticket"]["json"]).encode(), read, (ValueError,))


def test_changed_bytes_are_refused_or_valid(format_: Format) -> None:
    format_.read(format_.content)
    refused = 0
    for seed in range(fuzz_cases(150)):
        try:
            format_.read(changed(format_.content, random.Random(seed)))
        except format_.refused:
            refused += 1
    assert bool(refused) == bool(format_.refused)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_harmed_ticket_is_refused_or_is_the_same(sealed: bool, tiny_job: MakeJob, tmp_path: Path) -> None:
    """Without its seal, as folders of others are, any other number is as good; it is refused in words all the same."""
    job = tiny_job()
    ticket = make_ticket(job.layout, start(job).params, job.model_config.to_dict(), job.blueprints(1)[0], "sqrt")
    folder, copy = tmp_path / "ticket", tmp_path / "copy"
    export_ticket(ticket, folder, job.corpus.tokenizer_folder)
    if not sealed:
        (folder / SEAL).unlink()
    shutil.copytree(folder, copy)
    # Of its own: what transformers opens lies in the file that is going to be changed.
    ours = {name: value.clone() for name, value in open_model(folder).state_dict().items()}
    files, refused = sorted(path.name for path in folder.iterdir()), 0
    for seed in range(fuzz_cases(40)):
        rng = random.Random(seed)
        file = folder / rng.choice(files)
        file.write_bytes(changed(file.read_bytes(), rng))
        try:
            found = open_model(folder).state_dict()
            assert found.keys() == ours.keys()
            assert not sealed or all(torch.equal(found[name], value) for name, value in ours.items())
        except (ConfigError, DamagedError) as error:
            refused += 1
            assert str(folder) in str(error)
        shutil.copytree(copy, folder, dirs_exist_ok=True)
    assert refused > 0
