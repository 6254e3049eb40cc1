"""Nothing that was changed at random is taken for what was written: it is refused by name, or says the same.

Every draw is seeded (TWIST_FL_FUZZ: how many). What is refused raises one kind of error; any other kind fails the test.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import fuzz_cases
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from local_grid import assert_same_run, same

from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import Corpus, load_corpus, open_corpus
from twist_fl.federation import tensors, transport, wire
from twist_fl.federation.packing import Packing
from twist_fl.federation.transport import SegmentError
from twist_fl.model.subnet import State
from twist_fl.rounds import RoundMean, dispatch, plan, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import DamagedError
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Reply

MakeJob = Callable[..., Job]

# Files


def harm(folder: Path, rng: random.Random) -> None:
    """Change bytes of one file, cut it, add to it, remove it, give it another's content or name, or add one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file, other = rng.choice(files), rng.choice(files)
    content = bytearray(file.read_bytes())
    match rng.choice(["bytes", "bytes", "bytes", "swap", "cut", "add", "remove", "content", "name", "new", "folder"]):
        case "bytes":
            for _ in range(rng.choice([1, 1, 2, 9])):
                content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
            file.write_bytes(content)
        case "swap":  # the same bytes in another order
            i, j = rng.randrange(len(content)), rng.randrange(len(content))
            content[i], content[j] = content[j], content[i]
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[: rng.randrange(len(content))])
        case "add":
            file.write_bytes(content + rng.randbytes(rng.randint(1, 9)))
        case "remove":
            file.unlink()
        case "content":
            file.write_bytes(other.read_bytes())
        case "name":
            file.rename(file.with_name(rng.choice(["x", "model.bin", "SHA256SUMS", "tokenizer.json"])))
        case "new":
            (folder / "more.json").write_text("{}")
        case "folder":
            file.unlink()
            file.mkdir()


@pytest.fixture(scope="module")
def run_folder(tiny_job: MakeJob, random_state: Callable[..., State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with whole checkpoints of rounds 2 and 4, with everything in them that a checkpoint may have."""
    job = tiny_job(
        "train.optimizer_state=server",
        "aggregate.optimizer=adam",
        "blueprint.policy=importance",
        "blueprint.common=1",
    )
    folder = RunFolder(tmp_path_factory.mktemp("mutated") / "my run")
    folder.create(job)
    state = start(job)
    for state.round in (2, 4):
        state.params = random_state(job.layout, state.round)
        folder.save(state, job.model_config, job.corpus.tokenizer_folder)
    return folder.path


def test_a_harmed_checkpoint_is_refused_with_the_way_on_or_is_the_same(run_folder: Path, tmp_path: Path) -> None:
    whole = RunFolder(run_folder)
    ours = whole.load()
    assert ours is not None
    newest, copy = whole.checkpoints()[-1], tmp_path / "copy"
    shutil.copytree(newest, copy)
    refused = 0
    for seed in range(num := fuzz_cases(250)):
        harm(newest, random.Random(seed))
        try:
            found = RunFolder(run_folder).load()
            assert found is not None
            assert_same_run(found, ours)
            assert found.scores == ours.scores
        except DamagedError as error:
            refused += 1
            told = str(error)
            assert told.startswith(str(newest)), seed
            assert told.endswith(
                ". The checkpoint of round 2 is whole. To go on after it: "
                f"rm -r '{newest}' && twist-fl train --resume '{run_folder}'"
            ), seed
        shutil.rmtree(newest)
        shutil.copytree(copy, newest)
    assert 0.8 * num < refused < num  # two equal bytes may be swapped, and a file replaced by itself


def test_a_harmed_corpus_is_refused_or_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number}: the server sends a block.\n\n" for number in range(200)))
    ours = load_corpus(DataConfig(source="files", path=str(text), vocab_size=300, window=8))
    shutil.copytree(ours.folder, tmp_path / "copy")

    def content(corpus: Corpus) -> tuple[Any, ...]:
        return corpus.train.tolist(), corpus.test.tolist(), corpus.vocab_size, corpus.end_token

    expected, refused = content(ours), 0
    for seed in range(num := fuzz_cases(250)):
        harm(ours.folder, random.Random(seed))
        try:
            assert content(open_corpus(ours.digest, 8)) == expected, seed
        except DamagedError as error:
            refused += 1
            assert str(ours.folder) in str(error)
        shutil.rmtree(ours.folder)
        shutil.copytree(tmp_path / "copy", ours.folder)
    assert 0.8 * num < refused < num


# Messages

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.0, -0.0, 1.5, 1e308, -1e-300),
    *(float("nan"), float("inf"), "", "0", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 1000, [], [1], {}, {"a": 1}),
]


def changed_json(text: str, rng: random.Random) -> str:
    fields = json.loads(text)
    name = rng.choice(sorted(fields))
    match rng.choice(["value", "value", "value", "drop", "more", "byte", "cut", "swap"]):
        case "value":
            fields[name] = rng.choice(VALUES)
        case "drop":
            del fields[name]
        case "more":
            fields[rng.choice(["spy", "__class__", "params", ""])] = rng.choice(VALUES)
        case "swap":
            other = rng.choice(sorted(fields))
            fields[name], fields[other] = fields[other], fields[name]
        case "byte":
            i = rng.randrange(len(text))
            return text[:i] + chr(rng.randrange(1, 300)) + text[i + 1 :]
        case "cut":
            return text[: rng.randrange(len(text))]
    return json.dumps(fields)


def change_arrays(record: ArrayRecord, rng: random.Random) -> None:
    name = rng.choice(list(record))
    array = record[name]
    fields: dict[str, Any] = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    match rng.choice(["dtype", "stype", "shape", "cut", "add", "drop", "more", "name", "swap"]):
        case "dtype":
            fields["dtype"] = rng.choice(["float64", "float16", "bfloat16", "int8", "", "object", "<f4"])
        case "stype":
            fields["stype"] = rng.choice(["numpy.ndarray", "raw.big", "", "pickle"])
        case "shape":
            size = rng.choice([0, -1, 1, 7, 2**40, 2**62])
            place = rng.randrange(len(array.shape))
            choices = [(), (size,), (*array.shape, size), tuple(reversed(array.shape)), tuple(-n for n in array.shape)]
            fields["shape"] = rng.choice([*choices, (*array.shape[:place], size, *array.shape[place + 1 :])])
        case "cut":
            fields["data"] = array.data[: rng.randrange(len(array.data))]
        case "add":
            fields["data"] = array.data + bytes(rng.randint(1, 8))
        case "drop":
            del record[name]
            return
        case "name":
            del record[name]
            name += "x"
        case "more":
            name = rng.choice(["more", "blocks", "../x"])
        case "swap":
            other = rng.choice([each for each in record if record[each].shape != array.shape])
            record[name], record[other] = record[other], record[name]
            return
    record[name] = Array(**fields)


def change_handle(record: ConfigRecord, rng: random.Random) -> None:
    strange: list[Any] = [
        -1,
        0,
        1,
        3,
        2**31,
        2**62,
        -(2**62),
        0.5,
        True,
        "",
        "../../etc/passwd",
        "/dev/zero",
        b"1",
        [1],
    ]
    name = rng.choice(["name", "pid", "fd", "num_bytes", "checksum"])
    match rng.choice(["value", "value", "near", "drop"]):
        case "value":
            record[name] = rng.choice(strange)
        case "near":
            value: Any = record[name]
            record[name] = value + rng.choice(["x", "/..", "\0"] if name == "name" else [-1, 1, 64])
        case "drop":
            del record[name]


def changed(content: RecordDict, about: str, rng: random.Random) -> RecordDict:
    """A copy of a message with one thing changed."""
    new = RecordDict()
    for key, record in content.items():
        kind: Any = type(record)
        new[key] = kind(dict(record))
    parts = [*new.array_records, *(["shm"] if "shm" in new else [])]
    match rng.choice(["json", "json", "part", "part", "drop", "kind"]):
        case "json":
            new[about] = ConfigRecord({"json": changed_json(str(new.config_records[about]["json"]), rng)})
        case "part":
            part = rng.choice(parts)
            if part == "shm":
                change_handle(new.config_records[part], rng)
            else:
                change_arrays(new.array_records[part], rng)
        case "drop":
            del new[rng.choice([about, *parts])]
        case "kind":
            others: list[ConfigRecord | ArrayRecord] = [ConfigRecord({"a": 1}), ArrayRecord(), ConfigRecord()]
            new[rng.choice([about, *parts])] = rng.choice(others)
    return new


@pytest.fixture(params=["inline", "shm"])
def by(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def segment_for(job: Job, by: str) -> Iterator[transport.Segment | None]:
    if by == "inline":
        yield None
        return
    segment = transport.create(job.run_id, Packing.of(job, plan(job, start(job))[0].blueprint).segment_bytes)
    yield segment
    segment.close()


@pytest.mark.parametrize("optimizer_state", ["server", "factored"])
def test_a_changed_reply_is_refused_or_read_as_it_stands(optimizer_state: str, by: str, tiny_job: MakeJob) -> None:
    """One that is read has the honest tensors, and the mean counts it only if nothing in it differs that matters."""
    job = tiny_job(f"train.optimizer_state={optimizer_state}")
    state = start(job)
    tasks = plan(job, state)
    task = tasks[0]
    params, moments = dispatch(job, state, task)
    assert moments is not None
    after = Moments(task.num_batches, moments.values)
    windows = sum(job.shard(0).batch_length(i) for i in range(task.num_batches))
    honest = Reply(task.digest, params, 1.25, windows * 15, task.num_batches, moments=after)
    outcomes = {"refused": 0, "dropped": 0, "counted": 0}
    for segment in segment_for(job, by):
        content = wire.reply_to_records(job, task.blueprint, honest, segment)
        for seed in range(num := fuzz_cases(400)):
            other = changed(content, "reply", random.Random(seed))
            tensors.num_bytes(other)
            try:
                reply = wire.reply_from_records(job, task.blueprint, other, segment)
            except ReplyError as error:
                assert str(error).isprintable()
                assert len(str(error)) < 400
                outcomes["refused"] += 1
                continue
            assert reply.moments is not None
            pairs = [(reply.params, params)] + [
                (reply.moments.values[name], moments.values[name]) for name in moments.values
            ]
            mean = RoundMean(job, state, tasks)
            mean.add(task, reply)
            if mean.report.dropped:
                outcomes["dropped"] += 1
                continue
            outcomes["counted"] += 1
            said = replace(honest, loss=reply.loss, seconds=reply.seconds, peak_bytes=reply.peak_bytes, note=reply.note)
            assert about(reply) == about(said), seed
            assert all(same(*pair) for pair in pairs), seed
    assert outcomes["refused"] > 0.6 * num
    assert min(outcomes.values()) > 5


def about(reply: Reply) -> dict[str, Any]:
    return asdict(replace(reply, params={}, moments=None))


def test_a_changed_task_is_refused_or_is_a_task(by: str, tiny_job: MakeJob) -> None:
    job = tiny_job()
    state = start(job)
    task = plan(job, state)[0]
    expected, refused = dispatch(job, state, task)[0], 0
    for segment in segment_for(job, by):
        content = wire.task_to_records(job, job.to_json(), task, state.params, None, segment)
        for seed in range(num := fuzz_cases(400)):
            other = changed(content, "task", random.Random(seed))
            try:
                parcel = wire.task_from_records(job, other)
            except (wire.TaskError, SegmentError):
                refused += 1
                continue
            assert parcel.task.worker in job.clients
            assert parcel.task.blueprint == task.blueprint
            assert same(parcel.params, expected)
    assert 0.6 * num < refused < num


def test_no_other_file_is_opened_for_a_handle(tiny_job: MakeJob, tmp_path: Path) -> None:
    """A handle that names an open file of this process by its number: it is neither opened nor changed."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 64)
    with secret.open("r+b") as file:
        segment = transport.create("run", 32)
        handle = replace(segment.handle(), fd=file.fileno())
        with pytest.raises(SegmentError, match=r"is gone: in its place is .*secret$"):
            transport.attach(handle, "run")
        segment.close()
    assert secret.read_bytes() == b"x" * 64
