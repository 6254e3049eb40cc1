"""Corpora, the cache and the shards (spec, section 5)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twist_fl.config.schema import DataConfig
from twist_fl.data import corpus, documents, encode
from twist_fl.data.corpus import Corpus, Shard, find_corpus, load_corpus, open_corpus
from twist_fl.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from twist_fl.system.errors import ConfigError, DamagedError
from twist_fl.system.files import SEAL, cache_dir, read_json
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.job import Job, job_from_json, make_job
from twist_fl.training.worker import Worker

SENTENCE = "One block is held by two workers. "


def config_of(path: Path, **changes: Any) -> DataConfig:
    return replace(DataConfig(source="files", path=str(path), vocab_size=300, window=8), **changes)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A training file, two test files and one that is neither."""
    made = tmp_path / "text"
    made.mkdir()
    (made / "train.txt").write_text(20 * SENTENCE)
    (made / "test-1.txt").write_text("The first test. " * 5)
    (made / "test-2.txt").write_text("The second: αβγ. " * 5)
    (made / "notes.md").write_text("neither")
    return made


def tokens(corpus: Corpus, split: str) -> list[int]:
    return np.load(corpus.folder / f"{split}.npy").tolist()  # type: ignore[no-any-return]


def decoded(corpus: Corpus, split: str) -> str:
    tokenizer = load_tokenizer(str(corpus.tokenizer_folder))
    return str(tokenizer.decode(tokens(corpus, split), clean_up_tokenization_spaces=False))


# Corpora


def test_train_and_test_files_are_the_splits(folder: Path, own_cache: Path) -> None:
    corpus = load_corpus(config_of(folder))
    assert decoded(corpus, "train") == 20 * SENTENCE + END_OF_TEXT
    first, second = "The first test. " * 5, "The second: αβγ. " * 5
    assert decoded(corpus, "test") == first + END_OF_TEXT + second + END_OF_TEXT
    assert max(tokens(corpus, "train") + tokens(corpus, "test")) < corpus.vocab_size <= 300


def test_windows_are_the_tokens_in_order_without_the_rest(folder: Path, own_cache: Path) -> None:
    corpus = load_corpus(config_of(folder, window=7))
    everything = tokens(corpus, "test")
    assert corpus.test.shape == (len(everything) // 7, 7)
    assert corpus.test.dtype == np.int32
    assert corpus.test.flatten().tolist() == everything[: len(everything) // 7 * 7]
    assert isinstance(corpus.test, np.memmap)


@pytest.mark.parametrize("glob", [{"train_glob": "*.rst"}, {"test_glob": "*.rst"}])
def test_a_glob_that_was_given_and_matches_nothing_is_refused(glob: dict[str, str], folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"of the \d+ files .*_glob='\*\.rst' (matches )?0.*: give both so that each"):
        load_corpus(config_of(folder, **glob))


def test_other_globs_are_another_corpus(folder: Path, own_cache: Path) -> None:
    """The same files in the same order, split elsewhere: a cache that forgot the split would serve stale tokens."""
    one = load_corpus(config_of(folder, train_glob="t*-1.txt", test_glob="t*[2n].txt", vocab_size=257))
    other = load_corpus(config_of(folder, train_glob="t*-[12].txt", test_glob="train.txt", vocab_size=257))
    assert one.digest != other.digest
    assert decoded(one, "train") == "The first test. " * 5 + END_OF_TEXT


def test_one_file_is_split_by_paragraphs_and_nothing_is_lost(tmp_path: Path, own_cache: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + 60 * SENTENCE for number in range(40)]
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(paragraphs))
    corpus = load_corpus(config_of(file, test_fraction=0.3))
    parts = [decoded(corpus, split).split(END_OF_TEXT)[:-1] for split in ("train", "test")]
    assert sorted(part.strip() for part in parts[0] + parts[1]) == sorted(paragraph.strip() for paragraph in paragraphs)
    assert 4 <= len(parts[1]) <= 20


def test_a_folder_without_test_files_is_split_too(folder: Path, own_cache: Path) -> None:
    for name in ("test-1.txt", "test-2.txt"):
        (folder / name).unlink()
    for number in range(30):
        (folder / f"part-{number}.txt").write_text(f"Number {number}. " + 3 * SENTENCE)
    corpus = load_corpus(config_of(folder, test_fraction=0.3))
    parts = {split: set(decoded(corpus, split).split(END_OF_TEXT)) - {""} for split in ("train", "test")}
    assert not parts["train"] & parts["test"]
    assert len(parts["train"] | parts["test"]) == 32
    assert len(parts["test"]) > 2


def test_hidden_files_and_folders_are_no_text(tmp_path: Path, own_cache: Path) -> None:
    """A folder of text may be a repository."""
    texts = tmp_path / "texts"
    (texts / ".git" / "objects").mkdir(parents=True)
    for number in range(10):
        (texts / f"part-{number}.md").write_text(f"Number {number}. " + 3 * SENTENCE)
    before = load_corpus(config_of(texts, test_fraction=0.3)).digest
    for name in (".DS_Store", ".git/objects/pack"):
        (texts / name).write_bytes(b"\xff\x00 not text")
    assert load_corpus(config_of(texts, test_fraction=0.3)).digest == before


def test_text_is_not_for_training_and_test(folder: Path) -> None:
    (folder / "latest-train.txt").write_text(SENTENCE)
    with pytest.raises(
        ConfigError, match=r"'latest-train\.txt' matches data\.train_glob='\*train\*' and data\.test_glob="
    ):
        load_corpus(config_of(folder))


def test_a_document_keeps_its_split_when_others_come(tmp_path: Path, own_cache: Path) -> None:
    texts = tmp_path / "many"
    texts.mkdir()

    def test_documents(numbers: range) -> set[str]:
        for number in numbers:
            (texts / f"{number}.txt").write_text(f"Number {number}. " + 3 * SENTENCE)
        return set(decoded(load_corpus(config_of(texts, test_fraction=0.3)), "test").split(END_OF_TEXT)) - {""}

    before = test_documents(range(20))
    assert before
    assert before <= test_documents(range(20, 40))


# The cache


def test_a_cache_hit_does_not_tokenise_again(folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus(config_of(folder))
    monkeypatch.setattr(encode, "_encode", lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setattr(corpus, "train_tokenizer", lambda *_: pytest.fail("trained a tokenizer again"))
    again = load_corpus(config_of(folder, window=4))  # the window is a view of the same tokens
    assert again.digest == first.digest
    assert again.test.flatten().tolist()[:8] == first.test[0].tolist()


@pytest.mark.parametrize("change", ["text", "vocab_size", "tokenizer"])
def test_what_changes_the_tokens_changes_the_digest(change: str, folder: Path, own_cache: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    before = load_corpus(config).digest
    if change == "text":
        (folder / "train.txt").write_text(20 * SENTENCE + "More.")
    elif change == "vocab_size":
        config = replace(config, vocab_size=280)
    else:
        train_tokenizer(["abc"], 260).save_pretrained(tmp_path / "tokenizer")
        config = replace(config, tokenizer=str(tmp_path / "tokenizer"))
    assert load_corpus(config).digest != before


RACER = """
import sys, time
from pathlib import Path
from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import load_corpus
from twist_fl.data.tokenizer import train_tokenizer
train_tokenizer(["warm up"], 257)
Path(sys.argv[2]).touch()
while not all(Path(name).exists() for name in sys.argv[2:]):
    time.sleep(0.001)
corpus = load_corpus(DataConfig(source="files", path=sys.argv[1], vocab_size=300, window=8))
print(corpus.digest, corpus.train.sum())
"""


def test_two_processes_can_make_one_corpus_at_once(folder: Path, own_cache: Path, tmp_path: Path) -> None:
    flags = [str(tmp_path / "a"), str(tmp_path / "b")]
    racers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RACER, str(folder), mine, theirs], stdout=subprocess.PIPE, text=True
        )
        for mine, theirs in (flags, flags[::-1])
    ]
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert [path.name for path in own_cache.iterdir()] == [outputs[0].split()[0]]


class Stop(Exception):
    pass


def stop_after(num_batches: int, patch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[str]:
    """`work` ends with Stop after tokenising so many batches; returns those it did."""
    done, whole = list[str](), encode._encode

    def some(tokenizer: Any, batch: list[Any]) -> Any:
        if num_batches == len(done):
            raise Stop
        done.append("".join(piece.text for piece in batch))
        return whole(tokenizer, batch)

    patch.setattr(encode, "_encode", some)
    work()
    return done


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 50)
    monkeypatch.setattr(encode, "_BATCH_CHARS", 10)
    monkeypatch.setattr(encode, "_STRIDE", 100)


@pytest.mark.parametrize("num_batches", [0, 1, 5, 9])
@pytest.mark.usefixtures("small_batches")
def test_what_is_interrupted_goes_on_and_ends_the_same(
    num_batches: int, folder: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        total = len(stop_after(1000, patch, lambda: load_corpus(config_of(folder))))
    expected = load_corpus(config_of(folder))
    wanted = {file.name: file.read_bytes() for file in expected.folder.iterdir() if file.is_file()}
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / "other"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(num_batches, patch, lambda: load_corpus(config_of(folder)))
    assert not (tmp_path / "other" / "tokens").exists()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "train_tokenizer", lambda *_: pytest.fail("trained a tokenizer again"))
        again = stop_after(1000, patch, lambda: load_corpus(config_of(folder)))
    whole = load_corpus(config_of(folder))
    assert {file.name: file.read_bytes() for file in whole.folder.iterdir() if file.is_file()} == wanted
    a_stride = 100 // 10
    assert total - num_batches <= len(again) <= total - num_batches + a_stride
    assert list((tmp_path / "other" / "unfinished").iterdir()) == []


SLOW = """
import sys, time
from twist_fl.data import encode, documents as pieces
from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import load_corpus
whole = encode._encode
pieces.LONGEST, encode._BATCH_CHARS, encode._STRIDE = 50, 10, 100
def slow(*arguments):
    print("batch", flush=True)
    time.sleep(0.05)
    return whole(*arguments)
encode._encode = slow
load_corpus(DataConfig(source="files", path=sys.argv[1], vocab_size=300, window=8))
"""


@pytest.mark.usefixtures("small_batches")
def test_what_was_killed_goes_on_and_leaves_nothing(
    folder: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_corpus(config_of(folder))
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / "other"))
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for _ in range(6):
        assert process.stdout.readline() == "batch\n"
    process.kill()
    process.communicate()
    unfinished = tmp_path / "other" / "unfinished" / expected.digest
    assert read_json(unfinished / "journal.json")["pieces"] > 0
    begun = tmp_path / "other" / "tokens" / f".{expected.digest}.12345"  # it may as well have been killed here
    begun.mkdir(parents=True)
    corpus = load_corpus(config_of(folder))
    for split in ("train", "test"):
        assert tokens(corpus, split) == tokens(expected, split)
    assert [path.name for path in begun.parent.iterdir()] == [corpus.digest]
    assert list(unfinished.parent.iterdir()) == []


def test_an_unfinished_corpus_that_is_old_is_removed(folder: Path, own_cache: Path) -> None:
    old, new = (own_cache.parent / "unfinished" / name for name in ("old", "new"))
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "train.npy").touch()
    os.utime(old, (0, 0))
    load_corpus(config_of(folder))
    assert (old.exists(), new.exists()) == (False, True)


FILES = ["train.npy", "test.npy", "meta.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", SEAL]


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(max_examples=30)
def test_a_byte_of_a_cached_corpus_that_changed_is_noticed(name: str, where: float, flip: int) -> None:
    corpus = load_corpus(DataConfig(source="files", path=str(damaged_text()), vocab_size=300, window=8))
    file = corpus.folder / name
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= flip
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="remove the folder"):
        open_corpus(corpus.digest, 8)
    assert load_corpus(DataConfig(source="files", path=str(damaged_text()), vocab_size=300, window=8))


def damaged_text() -> Path:
    """Of this session, in its cache."""
    file = cache_dir() / "text-for-damage.txt"
    file.write_text("".join(f"Line {number}: {SENTENCE}\n\n" for number in range(300)))
    return file


def test_a_damaged_corpus_is_made_anew_where_its_text_is(
    folder: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder)
    corpus = load_corpus(config)
    whole = (corpus.folder / "train.npy").read_bytes()
    for make in (load_corpus, lambda config: find_corpus(corpus.digest, config.window, lambda: load_corpus(config))):
        (corpus.folder / "train.npy").write_bytes(whole[:-1] + b"x")
        assert make(config).digest == corpus.digest
        assert "train.npy is not what was written" in (said := capsys.readouterr().err)
        assert "it is made anew" in said
        assert (corpus.folder / "train.npy").read_bytes() == whole
    (corpus.folder / "train.npy").unlink()
    shutil.rmtree(folder)
    with pytest.raises(
        DamagedError, match=r"train\.npy is not what was written .*; it cannot be made anew here: data\.pa"
    ):
        find_corpus(corpus.digest, config.window, lambda: load_corpus(config))


# Errors


def test_a_missing_path_is_named_with_what_lies_beside_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"trian\.txt' does not exist, did you mean '.*/train\.txt'\?"):
        load_corpus(config_of(folder / "trian.txt"))
    with pytest.raises(ConfigError, match=r"xyz' does not exist; in .*: .*notes\.md, .*train\.txt"):
        load_corpus(config_of(folder / "xyz"))


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(ConfigError, match="holds no text"):
            load_corpus(config_of(path))


@pytest.mark.parametrize("name", ["train.txt", "test-1.txt"])
def test_text_that_is_not_utf8(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(ConfigError, match=rf"{name}' is not UTF-8 text \(.* at byte 3\)"):
        load_corpus(config_of(folder))


def test_too_few_windows(folder: Path, own_cache: Path) -> None:
    windows = len(load_corpus(config_of(folder)).train)
    load_corpus(config_of(folder), num_workers=windows)
    with pytest.raises(ConfigError, match=rf"training text gives {windows} windows .*fewer than {windows + 1}"):
        load_corpus(config_of(folder), num_workers=windows + 1)
    (folder / "test-1.txt").write_text("x")
    (folder / "test-2.txt").write_text("y")
    with pytest.raises(ConfigError, match=r"test text gives 0 windows of data\.window=8 tokens, fewer than 1"):
        load_corpus(config_of(folder))


def test_a_vocabulary_without_room_for_all_bytes(folder: Path, own_cache: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=256 must be at least 257"):
        load_corpus(config_of(folder, vocab_size=256))


# Tokenizers


@pytest.mark.parametrize("alone", [True, False])
def test_a_tokenizer_from_a_folder(alone: bool, folder: Path, own_cache: Path, tmp_path: Path) -> None:
    made = train_tokenizer([SENTENCE], 270)
    made.save_pretrained(tmp_path / "tokenizer")
    if alone:
        for file in (tmp_path / "tokenizer").iterdir():
            if file.name != "tokenizer.json":
                file.unlink()
    corpus = load_corpus(config_of(folder, tokenizer=str(tmp_path / "tokenizer")))
    assert tokens(corpus, "train") == [*made.encode(20 * SENTENCE), made.convert_tokens_to_ids(END_OF_TEXT)]
    assert corpus.vocab_size == len(made) == 270


def test_a_tokenizer_folder_that_is_none(folder: Path, own_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.* does not exist"):
        load_corpus(config_of(folder, tokenizer=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_corpus(config_of(folder, tokenizer=str(folder)))


def with_fields(folder: Path, **fields: Any) -> Path:
    """A copy whose tokenizer.json says more."""
    target = folder.with_name("says-more")
    shutil.copytree(folder, target)
    said = json.loads((target / "tokenizer.json").read_text())
    said["model"] |= {"dropout": fields.pop("dropout", None)}
    (target / "tokenizer.json").write_text(json.dumps(said | fields))
    return target


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 1}
PADDING = {
    **{"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": 8},
    **{"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
}


@pytest.mark.parametrize("say", [{"truncation": TRUNCATION}, {"padding": PADDING}, {"dropout": 0.5}])
def test_a_tokenizer_file_never_truncates_pads_or_drops(
    say: dict[str, Any], folder: Path, own_cache: Path, tmp_path: Path
) -> None:
    train_tokenizer([SENTENCE], 270).save_pretrained(tmp_path / "tokenizer")
    plain = load_corpus(config_of(folder, tokenizer=str(tmp_path / "tokenizer")))
    again = load_corpus(config_of(folder, tokenizer=str(with_fields(tmp_path / "tokenizer", **say))))
    assert again.digest == plain.digest
    shutil.rmtree(own_cache)
    again = load_corpus(config_of(folder, tokenizer=str(tmp_path / "says-more")))
    assert tokens(again, "train") == [*train_tokenizer([SENTENCE], 270).encode(20 * SENTENCE), 0]
    saved = json.loads((again.tokenizer_folder / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"], saved["model"]["dropout"]) == (None, None, None)
    assert (
        not {"max_length", "stride", "pad_token"}
        & json.loads((again.tokenizer_folder / "tokenizer_config.json").read_text()).keys()
    )


def test_a_tokenizer_that_was_called_with_truncation(folder: Path, own_cache: Path, tmp_path: Path) -> None:
    """What transformers writes after such a call (case 1)."""
    made = train_tokenizer([SENTENCE], 270)
    made.save_pretrained(tmp_path / "plain")
    made.pad_token = made.eos_token
    made(SENTENCE, truncation=True, max_length=8, padding="max_length", stride=2)
    made.save_pretrained(tmp_path / "called")
    assert json.loads((tmp_path / "called" / "tokenizer.json").read_text())["truncation"]
    plain, called = (load_corpus(config_of(folder, tokenizer=str(tmp_path / name))) for name in ("plain", "called"))
    assert tokens(plain, "train") == tokens(called, "train")
    assert called.vocab_size == plain.vocab_size
    assert load_tokenizer(str(tmp_path / "called")).pad_token == made.eos_token


def test_what_else_a_tokenizer_adds_to_a_text_is_not_in_the_corpus(
    folder: Path, own_cache: Path, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    made = train_tokenizer([SENTENCE], 270)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    made.model_max_length = 5
    made.save_pretrained(tmp_path / "tokenizer")
    corpus = load_corpus(config_of(folder, tokenizer=str(tmp_path / "tokenizer")))
    assert tokens(corpus, "train").count(0) == 1
    assert len(tokens(corpus, "train")) > 20


def test_whether_special_tokens_are_split_and_which_ends_a_text_is_part_of_the_digest(
    folder: Path, own_cache: Path, tmp_path: Path
) -> None:
    (folder / "train.txt").write_text(f"{20 * SENTENCE}{END_OF_TEXT}{SENTENCE}")
    digests = set()
    for name, change in {"plain": {}, "split": {"split_special_tokens": True}, "end": {"eos_token": "a"}}.items():
        train_tokenizer([SENTENCE], 270).save_pretrained(tmp_path / name)
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        corpus = load_corpus(config_of(folder, tokenizer=str(tmp_path / name)))
        digests.add(corpus.digest)
        assert tokens(corpus, "train").count(0) == {"plain": 2, "split": 1, "end": 1}[name]
    assert len(digests) == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model": 3}'])
def test_a_tokenizer_file_that_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json (is not JSON|holds no tokenizer).*: get it again"):
        load_tokenizer(str(tmp_path))


# WikiText


NAME = "wikitext-tiny-raw-v1"


@pytest.fixture
def wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    """`wikitext("copy", test=lines)`: a local copy as on the hub, whose Parquet files hold one row per line."""
    import datasets

    datasets.disable_progress_bars()

    def make(name: str, **splits: list[str]) -> DataConfig:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / os.urandom(4).hex())
        card = ["---", "configs:", f"- config_name: {NAME}", "  data_files:"]
        for split, lines in (WIKITEXT | splits).items():
            card += [f"  - split: {split}", f"    path: {NAME}/{split}-*"]
            write_parquet(tmp_path / name / NAME / f"{split}-00000-of-00001.parquet", lines)
        (tmp_path / name / "README.md").write_text("\n".join([*card, "---", "# WikiText"]))
        return DataConfig(source="wikitext", path=str(tmp_path / name), name=NAME, vocab_size=300, window=8)

    return make


ARTICLE = ["", " = Article = \n", "", " The <unk> @-@ text of it , in lines . \n"]
WIKITEXT = {"test": ARTICLE * 5, "train": ARTICLE * 20, "validation": [" never read \n"]}


def write_parquet(file: Path, lines: list[str]) -> None:
    import datasets

    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"text": lines}).to_parquet(file)


def test_wikitext_is_the_running_text_of_its_lines(wikitext: Callable[..., DataConfig], own_cache: Path) -> None:
    corpus = load_corpus(wikitext("copy"))
    for split in ("train", "test"):
        assert decoded(corpus, split) == "".join(WIKITEXT[split])


def test_wikitext_is_known_by_its_text_not_by_its_path(wikitext: Callable[..., DataConfig], own_cache: Path) -> None:
    """Nodes compare digests: equal copies must agree wherever they lie, different ones must not."""
    digests = [load_corpus(wikitext(name)).digest for name in ("here", "there")]
    assert digests[0] == digests[1]
    assert load_corpus(wikitext("here", test=ARTICLE * 6)).digest != digests[0]
    assert load_corpus(wikitext("there", train=[*ARTICLE * 19, "".join(ARTICLE)])).digest != digests[0]


# Shards

shards = st.builds(
    lambda seed, workers, extra, batch: [Shard(seed, w, workers, workers + extra, batch) for w in range(workers)],
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(1, 7),
)


def epoch_of(shard: Shard, epoch: int) -> list[list[int]]:
    first = epoch * shard.batches_per_epoch
    return [shard.batch(cursor).tolist() for cursor in range(first, first + shard.batches_per_epoch)]


def windows_of(shard: Shard, epoch: int) -> list[int]:
    return [window for batch in epoch_of(shard, epoch) for window in batch]


@given(shards)
def test_shards_are_disjoint_fixed_and_whole_in_every_epoch(workers: list[Shard]) -> None:
    windows = [sorted(windows_of(shard, 0)) for shard in workers]
    everything = [window for mine in windows for window in mine]
    assert all(len(set(mine)) == len(mine) == shard.size for mine, shard in zip(windows, workers, strict=True))
    assert len(set(everything)) == workers[0].num_windows // len(workers) * len(workers)
    assert set(everything) <= set(range(workers[0].num_windows))
    for epoch in (1, 2):
        assert [sorted(windows_of(shard, epoch)) for shard in workers] == windows


@given(shards)
def test_the_last_smaller_batch_of_an_epoch_is_trained(workers: list[Shard]) -> None:
    for shard in workers:
        *whole, last = [len(batch) for batch in epoch_of(shard, 1)]
        assert whole == [shard.batch_size] * len(whole)
        assert last == (shard.size % shard.batch_size or shard.batch_size)


def test_epochs_workers_and_seeds_are_shuffled_differently() -> None:
    shard = Shard(0, 0, 2, 100, 5)
    orders = [windows_of(shard, epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    other_seed = windows_of(replace(shard, seed=1), 0)
    assert sorted(other_seed) != sorted(orders[0])
    positions = [np.argsort(np.argsort(windows_of(replace(shard, worker=w), 0))).tolist() for w in (0, 1)]
    assert positions[0] != positions[1]


def test_shards_are_drawn_from_all_of_the_text() -> None:
    """I.i.d., not a contiguous piece each: every shard's mean window lies near the middle."""
    for worker in range(4):
        mine = np.concatenate([Shard(0, worker, 4, 4000, 10).batch(cursor) for cursor in range(100)])
        assert abs(mine.mean() - 2000) < 5 * 4000 / (12 * 1000) ** 0.5


def test_the_cursor_is_all_there_is() -> None:
    """A batch can be asked for in any order, by any process."""
    shard = Shard(7, 1, 3, 50, 4)
    forward = [shard.batch(cursor).tolist() for cursor in range(12)]
    backward = [Shard(7, 1, 3, 50, 4).batch(cursor).tolist() for cursor in reversed(range(12))]
    assert forward == backward[::-1]


# A job on another machine


def test_a_job_travels_as_json(tiny_job: Callable[..., Job]) -> None:
    job = tiny_job("blueprint.num_sub=[1,2,3]", "model.dropout=0.2")
    again = job_from_json(job.to_json())
    assert again.to_json() == job.to_json()
    assert (again.layout, again.division) == (job.layout, job.division)
    assert again.corpus.digest == job.corpus.digest
    assert again.model_config.to_dict() == job.model_config.to_dict()


def test_a_worker_without_the_cache_makes_it_and_one_with_other_text_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_job: Callable[..., Job]
) -> None:
    job = tiny_job(f"data.path={folder}", "data.window=4").to_json()
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / os.urandom(4).hex()))
    expected = make_job(job_from_json(job).config).corpus.digest
    assert open_corpus(expected, 4).digest in job
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / os.urandom(4).hex()))
    (folder / "train.txt").write_text(30 * SENTENCE)
    other = job_from_json(job)  # which needs no text
    with pytest.raises(ConfigError, match=rf"here is not the run's \(hash .*, expected {expected}\): give every node"):
        Worker(other, MomentShelf(tmp_path / "moments"))  # before it is given any task
