"""Nodes with text of their own: what they train on, what leaves them, and what happens when one is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import write_text
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto
from local_grid import LocalGrid, assert_same_run

from twist_fl.config.schema import load_config
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.rounds import run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.training.job import Job, make_job

MakeJob = Callable[..., Job]
SECRET = "Zebulon Quirk owes 7731 crowns to the miller of Oxbow. "


class Recording(LocalGrid):
    """A grid that keeps all bytes that leave its nodes."""

    def __init__(self, data: Sequence[object], **options: object) -> None:
        super().__init__(len(data), data=data, **options)  # type: ignore[arg-type]
        self.left: list[tuple[str, Message, bytes]] = []

    def _serve(self, message: Message) -> Sequence[Message]:
        replies = super()._serve(message)
        for reply in replies:
            sent = b"" if reply.has_error() else recorddict_to_proto(reply.content).SerializeToString()
            said = reply.error.reason or "" if reply.has_error() else ""
            self.left.append((message.metadata.message_type, reply, sent + said.encode()))
        return replies


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of different lengths."""
    folder = tmp_path_factory.mktemp("texts")
    for place, words in enumerate((400, 900, 1300)):
        (folder / f"{place}").mkdir()
        file = write_text(folder / f"{place}" / "a.txt", words, seed=20 + place)
        file.write_text(SECRET * 3 + file.read_text())
    return folder


@pytest.fixture
def job_of(tiny_job: MakeJob) -> MakeJob:
    return lambda *overrides: tiny_job("data.private=nodes", "eval.every=0", "flower.wait_for_nodes=0.2", *overrides)


def strategy_of(job: Job, folder: Path) -> TwistStrategy:
    made = RunFolder(folder)
    if not made.job_file.is_file():
        made.create(job)
    return TwistStrategy(made.job(), made)


def parts(texts: Path) -> list[Path]:
    return sorted(texts.iterdir())


SETTINGS = [
    ("flower.transport=inline", "train.weighting=tokens", "train.optimizer_state=server", "eval.federated=subnet"),
    ("train.optimizer_state=client",),
    ("train.variant=hybrid",),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings[-1])
def test_nodes_train_as_one_process_that_has_all_texts(
    job_of: MakeJob, tiny_job: MakeJob, tmp_path: Path, texts: Path, settings: tuple[str, ...]
) -> None:
    hybrid = "train.variant=hybrid" in settings
    job = job_of("eval.every=1", "eval.watch_windows=4", "train.rounds=5", *settings)
    strategy = strategy_of(job, tmp_path / "run")
    ended = strategy.run(LocalGrid(len(job.clients), data=parts(texts)[hybrid:]))
    assert all(task["dropped"] == {} for task in strategy.folder.events("round"))
    folders = tmp_path / "folders"
    shutil.copytree(texts, folders)
    if hybrid:  # the server trains on its own text
        shutil.rmtree(folders / "0")
        shutil.copytree(str(job.config.data.path), folders / "0")
    same = tiny_job(f"data.private={folders}", "train.rounds=5", *settings)
    assert_same_run(ended, run(same, start(same), tmp_path / "moments"))


KNOWN = {
    "query": {"node": {"partition", "token"}, "text": {"json"}},
    "train": {"reply": {"json"}},
    "evaluate": {"evaluation": {"loss-sum", "num-tokens"}},
}
"""Records of replies, with what they hold, but for arrays."""
TOLD = {"digest", "windows", "test"}
REPLY = {"digest", "loss", "num_tokens", "num_batches", "seconds", "note", "peak_bytes", "moment_step"}


def test_neither_text_nor_token_ids_leave_a_node(job_of: MakeJob, tmp_path: Path, texts: Path) -> None:
    """All bytes of all replies of a whole run: known records, floating-point arrays, and nothing of the text."""
    settings = ("flower.transport=inline", "eval.every=1", "eval.federated=full", "train.optimizer_state=server")
    job = job_of("train.rounds=3", *settings)
    grid = Recording(parts(texts))
    strategy_of(job, tmp_path / "run").run(grid)
    assert [kind for kind, *_ in grid.left] == ["query"] * 3 + (["train"] * 3 + ["evaluate"] * 3) * 3
    for kind, reply, _ in grid.left:
        assert not reply.has_error()
        for name, record in reply.content.items():
            if name in reply.content.array_records:
                assert kind == "train"
                assert {array.dtype for array in reply.content.array_records[name].values()} == {"float32"}
                continue
            assert set(record) == KNOWN[kind][name]
            if "json" in record:
                assert set(json.loads(str(record["json"]))) == (TOLD if name == "text" else REPLY)
    left = b"".join(sent for *_, sent in grid.left)
    for path in parts(texts):
        text = (path / "a.txt").read_bytes()
        assert not any(text[i : i + 16] in left for i in range(0, len(text) - 16, 4))
        assert str(path).encode() not in left
    for tokens in token_arrays(job, texts):
        for kind in (np.int32, np.int64, np.uint16, np.float32):
            assert not any(window[:6].astype(kind).tobytes() in left for window in tokens)
        assert not any(str(window[:6].tolist())[1:-1].encode() in left for window in tokens)
    # The same search finds what is there.
    digest = strategy_of(job, tmp_path / "run").folder.events("nodes")[0]["texts"]["1"]
    assert digest.encode() in left


def token_arrays(job: Job, texts: Path) -> list[np.ndarray]:  # type: ignore[type-arg]
    fields = {"data.private": texts, "data.path": job.config.data.path}
    words = [f"{key}={value}" for key, value in fields.items()]
    same = make_job(load_config(overrides=words, base=job.config))
    corpora = [same.text_of(worker).open() for worker in range(3)]
    assert sum(len(corpus.train) for corpus in corpora) > 100
    return [split for corpus in corpora for split in (corpus.train, corpus.test)]


def test_an_error_about_the_text_says_nothing_of_it(
    job_of: MakeJob, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from twist_fl.data import node_text

    real = node_text.load_own

    def load(config: object, path: str, tokenizer: Path) -> object:
        if path.endswith("/1"):
            raise ValueError(f"cannot read the row {SECRET!r}")
        return real(config, path, tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr(node_text, "load_own", load)
    grid, folder = Recording(parts(texts), broken=()), tmp_path / "run"
    monkeypatch.setattr(grid, "_serve", guarded(grid))
    strategy_of(job_of("train.rounds=1"), folder).run(grid)
    (nodes,) = RunFolder(folder).events("nodes")
    assert nodes["failed"] == ["ConfigError: the node of partition-id=1 cannot read its own text: its output says why"]
    assert SECRET[:12] in capsys.readouterr().err
    assert SECRET[:12].encode() not in b"".join(sent for *_, sent in grid.left)
    (round_,) = RunFolder(folder).events("round")
    assert round_["answered"] == [0, 2]
    assert round_["dropped"] == {"1": "the node that has its text is not here"}


def guarded(grid: LocalGrid) -> Callable[[Message], Sequence[Message]]:
    """An app's error becomes a reply, as Flower makes it."""
    from flwr.app import Error

    serve = grid._serve

    def served(message: Message) -> Sequence[Message]:
        try:
            return serve(message)
        except (ConfigError, ValueError) as error:
            return [Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message)]

    return served
