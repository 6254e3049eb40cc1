"""`twist-fl partition`: who gets which documents, and a run that trains on what it made."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st

from twist_fl.config.schema import DataConfig
from twist_fl.data.documents import LONGEST, Piece
from twist_fl.data.partition import Share, _whole, partition
from twist_fl.data.progress import Meter
from twist_fl.data.sources import find_source
from twist_fl.system.errors import ConfigError
from twist_fl.training.job import Job

SOURCES = ("code", "law", "news", "songs")
Deal = Callable[..., tuple[list[Share], list[list[str]]]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Four folders of two files with 30 rows each, all different."""
    folder = tmp_path_factory.mktemp("corpus")
    for source in SOURCES:
        (folder / source).mkdir()
        for half in (0, 1):
            rows = [json.dumps({"words": f"{source} {half} {i} " + "word " * 20}) for i in range(30)]
            (folder / source / f"{half}.jsonl").write_text("\n".join(rows))
    return DataConfig(source="files", path=str(folder), column="words")


@pytest.fixture
def deal(corpus: DataConfig, tmp_path: Path) -> Deal:
    """What each worker's share was said to be, and its documents."""

    def made(
        num_workers: int, alpha: float | None = None, seed: int = 0, config: DataConfig = corpus
    ) -> tuple[list[Share], list[list[str]]]:
        out = tmp_path / f"{num_workers}-{alpha}-{seed}"
        shares = partition(config, out, num_workers, alpha, seed, Meter())
        files = sorted(out.iterdir())
        assert len(files) == num_workers
        key = config.column or "text"
        return shares, [[json.loads(row)[key] for row in file.read_text().splitlines()] for file in files]

    return made


@pytest.mark.parametrize(("num_workers", "alpha"), [(1, None), (7, None), (12, None), (3, 0.5), (5, 100.0)])
def test_every_training_document_has_one_owner_and_no_test_text_any(
    corpus: DataConfig, deal: Deal, num_workers: int, alpha: float | None
) -> None:
    shares, owned = deal(num_workers, alpha)
    pieces = list(find_source(corpus, Meter()).pieces())
    assert Counter(text for texts in owned for text in texts) == Counter(p.text for p in pieces if p.train)
    assert any(not piece.train for piece in pieces)
    for share, texts in zip(shares, owned, strict=True):
        assert share == Counter({s: n for s in SOURCES if (n := sum(len(t) for t in texts if t.startswith(s)))})


def largest(shares: list[Share]) -> float:
    """The mean over sources of the part that one worker has."""
    return sum(max(s[source] for s in shares) / sum(s[source] for s in shares) for source in SOURCES) / len(SOURCES)


def test_a_small_alpha_leaves_a_source_to_few_and_a_large_one_to_all(deal: Deal) -> None:
    def mean(alpha: float | None) -> float:
        found = []
        for seed in range(8):
            try:
                found.append(largest(deal(4, alpha, seed)[0]))
            except ConfigError:  # somebody has nothing
                assert alpha
                assert alpha < 1
        return sum(found) / len(found)

    uneven, some, nearly, even = map(mean, (0.1, 1.0, 1000.0, None))
    assert uneven > 0.8 > some > nearly
    assert nearly == pytest.approx(even, abs=0.05)
    assert even < 0.4


def test_the_same_seed_deals_alike_and_another_does_not(deal: Deal, corpus: DataConfig, tmp_path: Path) -> None:
    _, owned = deal(3, 0.5)
    partition(corpus, tmp_path / "again", 3, 0.5, 0, Meter())
    assert [file.read_bytes() for file in sorted((tmp_path / "again").iterdir())] == [
        file.read_bytes() for file in sorted((tmp_path / "3-0.5-0").iterdir())
    ]
    assert deal(3, 0.5, seed=1)[1] != owned


def test_where_there_is_one_folder_a_source_is_a_file(corpus: DataConfig, deal: Deal) -> None:
    assert corpus.path
    one = DataConfig(source="files", path=str(Path(corpus.path) / "law"), column="words")
    shares, _ = deal(2, 10.0, config=one)
    assert {source for share in shares for source in share} == {"0.jsonl", "1.jsonl"}


@given(st.lists(st.tuples(st.text("ab ", min_size=1, max_size=1500), st.booleans(), st.sampled_from("xy"))))
def test_documents_stay_whole_and_running_text_in_parts_of_some_length(found: list[tuple[str, bool, str]]) -> None:
    given = [Piece(text, ends, True, part) for text, ends, part in found]
    made = list(_whole(given))
    for part in "xy":
        assert "".join(text for of, text in made if of == part) == "".join(p.text for p in given if p.part == part)
    assert all(len(text) < LONGEST for _, text in made)
    if all(piece.ends for piece in given):
        assert [text for _, text in made] == [piece.text for piece in given]


def test_a_run_trains_on_what_was_dealt_out(
    corpus: DataConfig, tiny_job: Callable[..., Job], run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "parts"
    words = (f"data.path={corpus.path}", "data.column=words")
    status, said, _ = run("partition", str(out), *words, "--workers=3", "--alpha=0.5", "--seed=1")
    assert status == 0
    assert f"data.private={out} train.workers=3" in " ".join(said.split())
    job = tiny_job(*words, f"data.private={out}", "train.workers=3", "train.batch_size=1")
    sizes = [job.shard(worker).size for worker in range(3)]
    assert len(set(sizes)) > 1
    assert all(sizes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers=3", "--alpha=0"), "alpha=0 must be a positive number"),
        (("--workers=3", "--alpha=nan"), "alpha=nan must be a positive number"),
        (("--workers=900",), "of 900 workers [0-9]+ would have no text .*: use fewer, or more text"),
        (("--workers=3", "--alpha=0.001"), "would have no text .* a larger alpha than 0.001, or another seed"),
        (("--workers=3", "train.lr=3"), "train.lr=3 changes nothing here"),
        (("--workers=3", "data.pth=x"), "data.pth"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_and_leaves_nothing(
    corpus: DataConfig, run: Run, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, _, error = run(
        "partition", str(tmp_path / "parts"), f"data.path={corpus.path}", "data.column=words", *words
    )
    assert status == 2
    assert re.search(message, " ".join(error.split())), error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    status, _, error = run("partition", str(tmp_path), "--workers=2")
    assert status == 2
    assert f"{tmp_path} exists: give a folder that is to be made" in " ".join(error.split())
    assert (tmp_path / "mine").read_text() == "x"
