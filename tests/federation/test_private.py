"""Nodes with text of their own: what they train on, what leaves them, and what happens when one is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import write_text
from flwr.app import Error, Message
from flwr.common.serde import recorddict_to_proto
from local_grid import LocalGrid, assert_same_run

from twist_fl.config.devices import DeviceConfig
from twist_fl.config.schema import DataConfig, load_config
from twist_fl.data.corpus import Corpus, Windows
from twist_fl.data.node_text import keep_tokenizer, tokenizer_digest, tokenizer_files
from twist_fl.data.own_text import load_own
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.federation.deploy import deploy_here
from twist_fl.federation.joining import node_arguments
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.rounds import run as rounds_run
from twist_fl.rounds import start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.results import final_results
from twist_fl.runs.resume import go_on
from twist_fl.runs.story import Story, lines, warnings
from twist_fl.runs.trained import TrainedRun
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
    job = job_of("eval.every=1", "eval.watch_windows=4", "train.rounds=3", *settings)
    strategy = strategy_of(job, tmp_path / "run")
    ended = strategy.run(LocalGrid(len(job.clients), data=parts(texts)[hybrid:]))
    assert all(task["dropped"] == {} for task in strategy.folder.events("round"))
    folders = tmp_path / "folders"
    shutil.copytree(texts, folders)
    if hybrid:  # the server trains on its own text
        shutil.rmtree(folders / "0")
        shutil.copytree(str(job.config.data.path), folders / "0")
    same = tiny_job(f"data.private={folders}", "train.rounds=3", *settings)
    assert_same_run(ended, rounds_run(same, start(same), tmp_path / "moments"))


KNOWN = {
    "query": {"node": {"partition"}, "text": {"json"}},
    "train": {"reply": {"json"}},
    "evaluate": {"evaluation": {"loss-sum", "num-tokens"}},
}
"""Records of replies, with what they hold, but for arrays."""
TOLD = {"digest", "windows", "test"}
REPLY = {"digest", "loss", "num_tokens", "num_batches", "seconds", "note", "peak_bytes", "moment_step"}


def test_neither_text_nor_token_ids_leave_a_node(job_of: MakeJob, tmp_path: Path, texts: Path) -> None:
    """All bytes of all replies of a whole run: known records, floating-point arrays, and nothing of the text."""
    settings = ("flower.transport=inline", "eval.every=1", "eval.federated=full", "train.optimizer_state=server")
    job = job_of("train.rounds=1", *settings)
    grid = Recording(parts(texts))
    strategy_of(job, tmp_path / "run").run(grid)
    assert [kind for kind, *_ in grid.left] == ["query"] * 3 + ["train"] * 3 + ["evaluate"] * 3
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
        assert not any(text[i : i + 16] in left for i in range(0, len(text) - 16, 32))
        assert str(path).encode() not in left
    for tokens in token_arrays(job, texts):
        for dtype in ("int32", "int64", "uint16", "float32"):
            assert not any(window[:6].astype(dtype).tobytes() in left for window in tokens)
        assert not any(str(window[:6].tolist())[1:-1].encode() in left for window in tokens)
    # The same search finds what is there.
    digest = strategy_of(job, tmp_path / "run").folder.events("nodes")[0]["texts"]["1"]
    assert digest.encode() in left


def token_arrays(job: Job, texts: Path) -> list[Windows]:
    fields = {"data.private": texts, "data.path": job.config.data.path}
    words = [f"{key}={value}" for key, value in fields.items()]
    same = make_job(load_config(overrides=words, base=job.config))
    corpora = [same.text_of(worker).open() for worker in range(3)]
    assert sum(len(corpus.train) for corpus in corpora) > 100
    return [split for corpus in corpora for split in (corpus.train, corpus.test)]


def test_an_error_about_the_text_says_nothing_of_it(
    job_of: MakeJob, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def load(config: DataConfig, path: str, tokenizer: Path) -> Corpus:
        if path.endswith("/1"):
            raise ValueError(f"cannot read the row {SECRET!r}")
        return load_own(config, path, tokenizer)

    monkeypatch.setattr("twist_fl.data.node_text.load_own", load)
    grid, folder = Recording(parts(texts)), tmp_path / "run"
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
    serve = grid._serve

    def served(message: Message) -> Sequence[Message]:
        try:
            return serve(message)
        except (ConfigError, ValueError) as error:
            return [Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message)]

    return served


def test_nobody_stands_in_for_a_node_that_is_away_and_it_comes_back_as_the_same_worker(
    job_of: MakeJob, tmp_path: Path, texts: Path
) -> None:
    away: dict[int, int] = {}

    def leave(task: object, message: Message, answer: Callable[[], Message]) -> Sequence[Message]:
        round_, worker = task.round, task.worker  # type: ignore[attr-defined]
        if (round_, worker) == (2, 1):
            node = message.metadata.dst_node_id
            away[node] = grid.partitions.pop(node)
            return [Message(error_of("gone"), reply_to=message)]
        if (round_, worker) == (4, 2):  # the last of its round
            grid.partitions.update(away)
        return [answer()]

    grid, folder = LocalGrid(3, leave, data=parts(texts)), tmp_path / "run"
    strategy_of(job_of("train.rounds=6"), folder).run(grid)
    dropped = [event["dropped"] for event in RunFolder(folder).events("round")]
    gone = {"1": "the node that has its text is not here"}
    assert dropped == [{}, {"1": "ValueError: gone"}, gone, gone, {}, {}]
    served = {(served.task.worker, served.node) for served in grid.served}
    assert len(served) == 3
    assert [len(event["windows"]) for event in RunFolder(folder).events("nodes")] == [3, 2, 3]


def error_of(reason: str) -> Error:
    return Error(code=2, reason=f"<class 'ValueError'>:<'{reason}'>")


def test_text_that_has_changed_when_a_run_goes_on_is_said(job_of: MakeJob, tmp_path: Path, texts: Path) -> None:
    mine, folder = tmp_path / "mine", RunFolder(tmp_path / "run")
    shutil.copytree(texts, mine)
    folder.create(job_of("train.rounds=1"))
    TwistStrategy(folder.job(), folder).run(LocalGrid(3, data=parts(mine)))
    write_text(mine / "2" / "b.txt", 200, seed=5)
    words = ["train.rounds=2"]
    strategy = TwistStrategy(go_on(folder, words).job, folder)
    strategy.run(LocalGrid(3, data=parts(mine)))
    before, after = folder.events("nodes")
    assert before["notes"] == {}
    assert after["notes"] == {"2": "its text is not what it was: the run goes on with what it has now"}
    assert after["windows"]["2"] > before["windows"]["2"]
    assert list(warnings(after)) == [f"worker 2: {after['notes']['2']}"]
    assert folder.events("round")[-1]["answered"] == [0, 1, 2]
    story = Story()
    story.add(after)
    sizes = sorted(after["windows"].values())
    assert next(iter(lines(after, story))).endswith(f"each with its own text: {sizes[0]:,} to {sizes[-1]:,} windows")


def test_a_node_that_cannot_be_a_worker_is_refused_by_name(
    job_of: MakeJob, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = write_text(tmp_path / "short.txt", 60)
    grid = LocalGrid(4, data=[short, *parts(texts)])
    grid.settings[2]["partition-id"] = 1
    del grid.settings[3]["data"]
    monkeypatch.setattr(grid, "_serve", guarded(grid))
    strategy_of(job_of("train.rounds=1", "train.batch_size=8"), tmp_path / "run").run(grid)
    (nodes,) = RunFolder(tmp_path / "run").events("nodes")
    said = " | ".join(sorted(nodes["failed"]))
    assert "the node of partition-id=0 has 7 windows of data.window=16 tokens to train on, fewer than train.b" in said
    assert "two nodes have partition-id=1: give each worker's node its own" in said
    assert "the node of partition-id=3 has no text of its own" in said
    assert 'a stock SuperNode: data="PATH" in --node-config' in said
    assert len(nodes["failed"]) == 3
    grid = LocalGrid(1, data=[texts / "1"])
    del grid.settings[0]["partition-id"]
    with pytest.raises(NoWorkersError, match=r"partition-id says which worker's text it has: it must be 0 to 2"):
        strategy_of(job_of("train.rounds=1"), tmp_path / "other").run(grid)


def test_a_tokenizer_that_is_not_the_runs_is_not_kept(tiny_job: MakeJob, cache: Path) -> None:
    files = tokenizer_files(tiny_job().corpus.tokenizer_folder)
    with pytest.raises(ValueError, match=r"^tokenizer: what came is not of the hash 0+$"):
        keep_tokenizer(files, "0" * 32)
    for name in ("../tokenizer.json", "modeling.py"):
        with pytest.raises(ValueError, match=r"^tokenizer: '.*' is none of its files$"):
            keep_tokenizer(bad := {**files, name: ""}, tokenizer_digest(bad))
    keep_tokenizer(files, digest := tokenizer_digest(files))
    assert tokenizer_files(cache / "tokenizers" / digest) == files


def test_a_server_without_text_trains_and_has_what_the_nodes_find(
    job_of: MakeJob, tiny_job: MakeJob, tmp_path: Path, texts: Path
) -> None:
    tokenizer = tiny_job().corpus.tokenizer_folder
    settings = ("eval.every=1", "eval.federated=full", "train.rounds=2", f"data.tokenizer={tokenizer}")
    job = job_of("data.path=null", "data.source=empty", "deploy.new_tokens=4", *settings)
    assert (job.corpus.train.shape, job.corpus.test.shape) == ((0, 16), (0, 16))
    strategy = strategy_of(job, tmp_path / "run")
    ended = strategy.run(LocalGrid(3, data=parts(texts)))
    results = final_results(job, ended, strategy.folder)
    assert "full" not in results
    assert results["tickets"] == []
    assert results["federated"] == strategy.folder.events("federated")[-1]["perplexity"] > 1
    assert strategy.folder.events("eval") == []
    (event,) = strategy.folder.events("results")
    assert next(iter(lines(event, Story()))).startswith("no test text here; as the workers find it ")
    with pytest.raises(ConfigError, match=r"there is no test text here: .* \(data\.source=empty\)"):
        TrainedRun(strategy.folder.path).perplexity()
    with pytest.raises(ConfigError, match=r"^device phone has no test text to measure a ticket on"):
        deploy_here(strategy.folder, job, ended, [DeviceConfig("phone", 3.0)], print)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("data.private=nodes", "data.private=nodes needs train.rounds"),
        ("data.source=empty", "data.source=empty is for workers with text of their own: set data.private"),
        (
            "data.source=empty data.private=x",
            "data.source=empty has no text to train a tokenizer on",
        ),
        ("data.source=empty data.path=x", "data.path='x' is not read with data.source=empty"),
        (
            "data.source=empty data.private=x data.tokenizer=y train.variant=hybrid",
            "train.variant=hybrid needs text where the server is, and data.source=empty gives it none",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(overrides=settings.split())


def test_a_simulation_has_no_nodes_with_text_of_their_own(run: Callable[..., tuple[int, str, str]]) -> None:
    for local in ((), ("--local",)):
        status, _, said = run("train", "demo", *local, "data.private=nodes", "train.rounds=1")
        assert status == 2, said
        assert "data.private=nodes trains on nodes of other machines (docs/nodes.md): here, give the folder" in said


def test_the_node_command_takes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(data: str, node_config: str = "partition-id=0") -> list[str]:
        return node_arguments("localhost:8000", True, None, None, node_config, None, data)

    monkeypatch.chdir(tmp_path)
    write_text(Path("my text.txt"), 10)
    for given in ("my text.txt", "*.txt"):
        words = arguments(given)
        assert words[words.index("--node-config") + 1] == f"partition-id=0 data='{tmp_path / given}'"
    for data, config, reason in [
        ("my tex.txt", "", r"--data 'my tex\.txt' does not exist, did you mean '.*/my text\.txt'"),
        ("*.md", "", r"--data '\*\.md' does not exist"),
        ("*.txt", "data=1", r"--data '\*\.txt' and data in --node-config 'data=1' are the same: give one"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            arguments(data, config)
    Path("n.toml").touch()
    with pytest.raises(ConfigError, match=r"write data = '\*\.txt' into that file"):
        arguments("*.txt", "n.toml")
