"""Fixtures: jobs so small that a round takes milliseconds, on text that the tests write. Nothing needs a network."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from twist_fl.blueprint.blocks import Layout
from twist_fl.cli import app, train
from twist_fl.config.schema import load_config
from twist_fl.data.tokenizer import train_tokenizer
from twist_fl.model.subnet import State
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.training.job import Job, make_job

if TYPE_CHECKING:
    from twist_fl.federation.strategy import TwistStrategy

Run = Callable[..., tuple[int, str, str]]
"""A command in this process: its words to its exit status, standard output and standard error."""

# Deterministic: the same examples on every machine, and no slow-machine failures.
settings.register_profile("twist", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("twist")

# Worker.train sets the number of threads to train.threads; bit-for-bit comparisons need one number everywhere.
torch.set_num_threads(1)

LONGEST = (
    *("test_app.py", "test_resume.py", "test_node.py", "test_network.py", "test_examples.py", "test_readme.py"),
    *("test_reproduce.py", "test_come_and_go.py", "test_chaos.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Temporary folders in memory, where that is to be had: what is tested flushes all that it writes."""
    memory = Path("/dev/shm")
    if memory.is_dir() and not config.option.basetemp and not hasattr(config, "workerinput"):
        config.option.basetemp = memory / f"twist-fl-tests-{os.getpid()}"
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start whole programs come first: begun last, one would keep a single core busy to the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def fuzz_cases(few: int) -> int:
    """How many changed inputs a test draws: few, or as many as TWIST_FL_FUZZ says."""
    return int(os.environ.get("TWIST_FL_FUZZ", few))


WORDS = ["the", "a", "worker", "holds", "block", "head", "layer", "that", "server", "sends", "of", "and", "subnet"]


def write_text(file: Path, num_words: int, seed: int = 0) -> Path:
    """Paragraphs of random words."""
    rng = random.Random(seed)
    words = [rng.choice(WORDS) + rng.choice(["", "", "", ".", ",", "s", "\n\n"]) for _ in range(num_words)]
    file.write_text(" ".join(words))
    return file


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenised corpora of this session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWIST_FL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.txt and test.txt: about 800 and 100 windows of 16 tokens."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "train.txt", 6000, seed=1)
    write_text(folder / "test.txt", 700, seed=2)
    return folder


@pytest.fixture(scope="session")
def tiny(text_folder: Path) -> tuple[str, ...]:
    """Overrides of a tiny job: 5 layers of which layers 1 and 2 are divided, 4 blocks, 3 workers of 2 blocks."""
    return (
        "data.source=files",
        f"data.path={text_folder}",
        "data.vocab_size=300",
        "data.window=16",
        "model.n_layer=5",
        "model.n_head=4",
        "model.n_embd=32",
        "model.n_positions=32",
        "model.dropout=0",
        *("blueprint.num_sub=2", "blueprint.common=0", "blueprint.scale=sqrt", "aggregate.optimizer=mean"),
        "blueprint.undivided_first=1",
        "blueprint.undivided_last=2",
        "train.workers=3",
        "train.interval=2",
        "train.rounds=2",
        "train.lr=1e-2",
        "train.threads=1",
        "train.device=cpu",
        "eval.batch_size=4",
        "eval.sizes=[2]",
        "eval.tickets=3",
    )


@pytest.fixture(scope="session")
def tiny_job(tiny: tuple[str, ...]) -> Callable[..., Job]:
    """`tiny_job("train.workers=1", ...)`: the tiny job with overrides."""

    def make(*overrides: str) -> Job:
        return make_job(load_config(overrides=[*tiny, *overrides]))

    return make


@pytest.fixture
def make_strategy(tiny_job: Callable[..., Job], tmp_path: Path) -> Callable[..., TwistStrategy]:
    """A strategy of the tiny job with overrides, in a run folder of its own."""
    from twist_fl.federation.strategy import TwistStrategy  # loads Flower

    def make(*overrides: str) -> TwistStrategy:
        job = tiny_job("model.dropout=0.1", "flower.wait_for_nodes=0.05", "eval.every=0", *overrides)
        folder = RunFolder(tmp_path / f"run-{job.run_id}")
        folder.create(job)
        return TwistStrategy(job, folder)

    return make


@pytest.fixture(scope="session")
def random_state() -> Callable[..., State]:
    """`random_state(layout, seed, dtype)`: every parameter random, biases and norms too, so that none is invisible."""

    def make(layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for param in layout.params:
            value = 0.2 * torch.randn(param.shape, generator=generator, dtype=torch.float64)
            is_norm = re.search(r"(\.ln_|norm).*weight$", param.name)
            state[param.name] = (value + 1 if is_norm else value).to(dtype)
        return state

    return make


@pytest.fixture(scope="session")
def small(tiny: tuple[str, ...]) -> tuple[str, ...]:
    """The tiny job for two workers, with little to evaluate."""
    return (*tiny, "train.workers=2", "eval.every=0", "eval.max_windows=4", "eval.tickets=2", "deploy.new_tokens=4")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """`run("train", "demo")`: exit status, stdout and stderr of the command, in an empty folder, wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *given: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def started(*given: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["twist-fl", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    width = app.console.width
    app.console.width = 200
    yield started
    app.console.width = width


@pytest.fixture
def no_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may train: a simulation that starts while a command looks at its words is not begun."""

    class Refused:
        def begin(self) -> None:
            raise AssertionError("a run was begun")

    monkeypatch.setattr(train, "flower_run", lambda *given: nullcontext(Refused()))


_MODULES = count()


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`user_module(code)`: the name of a new module of the user's, with that code, on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> str:
        name = f"of_the_users_{next(_MODULES)}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens. Nobody may write here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "the cat sat on the mat, it's 1,234 o'clock and the dog sat on the log"
    train_tokenizer([text] * 9, 300).save_pretrained(folder)
    return folder
