"""Text in all forms in which people have it, and the law by which long documents are cut."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from twist_fl.config.schema import DataConfig
from twist_fl.data import builtin_text
from twist_fl.data import documents as pieces_module
from twist_fl.data.documents import Piece, Source, held_out, lines, pieces, running_documents
from twist_fl.data.progress import Meter
from twist_fl.data.run_text import RunText
from twist_fl.data.sources import find_source
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import check_seal

ROWS = [f"Row {number} of a data set, NA and null with, commas and\n\nlines." for number in range(40)]


def found(path: Path | str, **changes: Any) -> Source:
    return find_source(replace(DataConfig(source="files", path=str(path)), **changes), Meter())


def documents(text: Source) -> dict[str, list[str]]:
    """Of each split, joined from their pieces."""
    splits: dict[str, list[str]] = {"train": [], "test": []}
    going = {"train": "", "test": ""}
    for piece in text.pieces():
        split = "train" if piece.train else "test"
        going[split] += piece.text
        if piece.ends:
            splits[split].append(going[split])
            going[split] = ""
    assert going == {"train": "", "test": ""}
    return splits


def everything(text: Source) -> list[str]:
    splits = documents(text)
    assert splits["train"]
    assert splits["test"]
    return sorted(splits["train"] + splits["test"])


# Cutting

WORDS = st.text(st.sampled_from("abcdeéß中字'.,-_1234  \n\n\t\u00a0\u3000\u0301"), max_size=400)
LAW = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                    r"\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "bert": pre_tokenizers.BertPreTokenizer(),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    made = {}
    for name, pre_tokenizer in LAW.items():
        tokenizer = Tokenizer(models.BPE(unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizer
        if name == "bert":
            tokenizer.normalizer = normalizers.BertNormalizer()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False)
        tokenizer.train_from_iterator(["abc  a bb éß 'll 12 345.\n\n中字 ab, ab. a-b\n" * 20], trainer)
        made[name] = tokenizer
    return made


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("name", LAW)
@given(text=WORDS)
def test_a_cut_before_a_single_space_changes_no_token(name: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[name]
    for place in range(1, len(text) - 1):
        if text[place] == " " and not text[place - 1].isspace() and not text[place + 1].isspace():
            cut = [*tokens_of(tokenizer, text[:place]), *tokens_of(tokenizer, text[place:])]
            assert cut == tokens_of(tokenizer, text)


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
@given(text=WORDS)
def test_a_cut_after_a_line_changes_no_token_of_a_byte_level_bpe(
    name: str, text: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    for place in range(2, len(text)):
        if text[place - 1] == "\n" and not text[place - 2].isspace() and not text[place].isspace():
            cut = [*tokens_of(tokenizer, text[:place]), *tokens_of(tokenizer, text[place:])]
            assert cut == tokens_of(tokenizer, text)


SHORT = 16


def in_chunks(text: str, sizes: list[int]) -> Iterator[str]:
    at = 0
    for size in sizes:
        yield text[at : at + size]
        at += size
    yield text[at:]


@given(text=WORDS, sizes=st.lists(st.integers(0, 40)))
def test_pieces_are_the_text_whatever_its_chunks(text: str, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "LONGEST", SHORT)
        made = list(pieces(in_chunks(text, sizes)))
        assert made == list(pieces([text]))
    assert "".join(piece for piece, _ in made) == text
    assert all(0 < len(piece) <= SHORT for piece, _ in made)
    assert [ends for _, ends in made] == [False] * (len(made) - 1) + [True] * bool(made)


@given(text=WORDS, sizes=st.lists(st.integers(0, 40)), longest=st.sampled_from([4, 16, 64, 1000]))
def test_documents_of_running_text_are_the_text(text: str, sizes: list[int], longest: int) -> None:
    made = list(running_documents(in_chunks(text, sizes), longest))
    assert made == list(running_documents([text], longest))
    assert all(0 < len(document) <= longest for document in made)
    assert "".join(made).split() == text.split()


@given(text=WORDS, sizes=st.lists(st.integers(0, 40)))
def test_lines_are_the_text_without_blank_ones(text: str, sizes: list[int]) -> None:
    expected = [line + "\n" for line in text.split("\n") if line.strip()]
    made = list(lines(in_chunks(text, sizes)))
    assert [line.rstrip("\n") + "\n" for line in made] == expected


def test_a_document_ends_at_the_first_blank_line_after_2000_characters() -> None:
    paragraph = "word " * 100 + "end"
    for blank in ("\n\n", "\n \n", "\n \t\n"):
        text = blank.join([paragraph] * 30)
        made = list(running_documents([text]))
        assert made[0] == (paragraph + blank) * 4
        assert "".join(made) == text


@given(st.lists(st.text("ab \n", max_size=30), max_size=30), st.floats(0.01, 0.99))
def test_two_documents_give_both_splits(texts: list[str], fraction: float) -> None:
    def read(longest: int | None) -> Iterator[tuple[str, str]]:
        return iter([("a part", text) for text in texts if text.strip()])

    held = held_out(read, fraction, Meter())
    assert held.both == (len(set(read(None))) > 1)
    assert sorted((piece.part, piece.text) for piece in held.pieces()) == sorted(read(None))


def test_text_that_changes_while_it_is_read_is_refused() -> None:
    contents = iter(["one", "one", "two"])
    text = pieces_module.survey(lambda: iter([Piece(next(contents), True, True)]), Meter())
    assert [piece.text for piece in text.pieces()] == ["one"]
    with pytest.raises(ConfigError, match="was changed while it was read"):
        list(text.pieces())


def test_a_source_that_begins_slowly_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace is that after its first piece, and there is none before."""
    now = iter([0.0, 5.0, 16.0])
    monkeypatch.setattr("twist_fl.data.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    said = io.StringIO()
    with Meter(Console(file=said)).task("reading text", 22_100) as advance:
        advance(100)
        advance(22_000)
    assert said.getvalue().splitlines() == [
        "reading text: 100 B of 22.1 kB, 0%",
        "reading text: 22.1 kB of 22.1 kB, 2.0 kB/s, 100%",
    ]


# Forms of text


def write(file: Path, texts: list[str], column: str = "text") -> Path:
    """By its ending; with a column of numbers beside the text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = file.with_suffix("") if file.suffix == ".gz" else file
    rows = datasets.Dataset.from_dict({"id": list(range(len(texts))), column: texts})
    if plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts))
    elif plain.suffix == ".json":
        plain.write_text(json.dumps([{"id": 1, column: text} for text in texts]))
    elif plain.suffix == ".csv":
        rows.to_csv(plain)
    elif plain.suffix == ".parquet":
        rows.to_parquet(plain)
    elif plain.suffix == ".arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(plain), features=rows.features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    else:
        plain.write_text("\n\n".join(texts))
    if file != plain:
        with gzip.open(file, "wb") as packed:
            packed.write(plain.read_bytes())
        plain.unlink()
    return file


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


ROW_FORMS = [f"{form}{packed}" for form in ("jsonl", "json", "csv", "parquet", "arrow") for packed in ("", ".gz")]


@pytest.mark.parametrize("form", ROW_FORMS)
def test_rows_are_documents(form: str, tmp_path: Path) -> None:
    for column in ("text", "content"):
        text = found(write(tmp_path / f"we[i]rd *.{form}", ROWS, column))
        assert everything(text) == sorted(ROWS)


@pytest.mark.parametrize("form", [*ROW_FORMS, "txt", "md.gz"])
def test_a_folder_with_a_training_and_a_test_file(form: str, tmp_path: Path) -> None:
    write(tmp_path / "sub" / f"train-0.{form}", ROWS[:20])
    write(tmp_path / "sub" / f"test-0.{form}", ROWS[20:25])
    write(tmp_path / "sub" / f"valid-0.{form}", ROWS[25:])
    splits = documents(found(tmp_path))
    if form in ROW_FORMS:
        assert splits == {"train": ROWS[:20], "test": ROWS[20:25]}
    else:
        assert splits == {"train": ["\n\n".join(ROWS[:20])], "test": ["\n\n".join(ROWS[20:25])]}
    (tmp_path / "sub" / f"test-0.{form}").unlink()
    assert documents(found(tmp_path))["test"][-1].endswith(ROWS[-1])  # validation text stands in


def test_one_text_has_one_digest_in_every_form(tmp_path: Path) -> None:
    digests = {found(write(tmp_path / f"a.{form}", ROWS)).digest for form in ROW_FORMS}
    assert len(digests) == 1


def test_folders_say_which_split_too(tmp_path: Path) -> None:
    write(tmp_path / "train" / "pos" / "1.txt", ["good"])
    write(tmp_path / "test" / "pos" / "1.txt", ["bad"])
    assert documents(found(tmp_path)) == {"train": ["good"], "test": ["bad"]}


def test_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", ["one\n\n" + "x" * 3000, "two"])
    write(tmp_path / "b.log", ["never"])
    write(tmp_path / "deep" / "c.txt", ["y" * 2500])
    assert "never" not in "".join(everything(found(tmp_path / "**" / "*.txt")))
    assert "y" * 100 in "".join(everything(found(tmp_path / "**" / "*.txt")))
    with pytest.raises(ConfigError, match=r"\*\.rst' matches nothing; in .*: a\.txt, b\.log, deep"):
        found(tmp_path / "*.rst")


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_a_folder_that_save_to_disk_wrote(kind: str, tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"id": [1] * len(rows), "text": rows}) for rows in (ROWS[:30], ROWS[30:]))
    if kind == "Dataset":
        train.save_to_disk(tmp_path / "saved")
        assert everything(found(tmp_path / "saved")) == sorted(ROWS[:30])
    else:
        datasets.DatasetDict({"train": train, "validation": test}).save_to_disk(tmp_path / "saved")
        assert documents(found(tmp_path / "saved")) == {"train": ROWS[:30], "test": ROWS[30:]}
        with pytest.raises(ConfigError, match=r"of the 2 splits \(train, validation\) .*_glob='dev' 0"):
            found(tmp_path / "saved", test_glob="dev")


def test_the_hubs_layout_without_its_readme(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        write(tmp_path / "one" / "data" / f"{split}-00000-of-00001.parquet", rows)
        for name in ("big", "small"):
            write(tmp_path / "two" / name / f"{split}-00000-of-00001.parquet", [name, *rows])
    assert documents(found(tmp_path / "one")) == {"train": ROWS[:30], "test": ROWS[30:]}
    assert documents(found(tmp_path / "two", name="small"))["train"][0] == "small"
    with pytest.raises(ConfigError, match=r"has several configurations, big, small: choose one with data\.name"):
        found(tmp_path / "two")
    with pytest.raises(
        ConfigError, match=r"data\.name='smal' is no folder in .*did you mean 'small'\?; there: big, sm"
    ):
        found(tmp_path / "two", name="smal")


def test_wikitexts_old_layout_is_the_hubs_text(tmp_path: Path) -> None:
    """There blank lines hold a space, and rows that hold nothing are left out."""
    rows = {split: [f" = {split} {i} = \n" if i % 3 else "" for i in range(50)] for split in ("train", "test")}
    for split, texts in rows.items():
        write(tmp_path / "hub" / "wikitext-2-v1" / f"{split}-00000-of-00001.parquet", texts)
    (tmp_path / "old").mkdir()
    for split, texts in rows.items():
        (tmp_path / "old" / f"wiki.{split}.tokens").write_text("".join(text or " \n" for text in texts))
    old = found(tmp_path / "old", source="wikitext")
    assert old.digest == found(tmp_path / "hub", source="wikitext").digest
    assert not any(piece.ends for piece in old.pieces())


def test_wikitext_of_one_file_has_both_splits(tmp_path: Path) -> None:
    """Its blank lines hold a space."""
    file = tmp_path / "wiki.valid.raw"
    file.write_text(" \n = Title = \n \n" + " The text of it , in lines . \n \n" * 2000)
    assert "".join(everything(found(file))).split() == file.read_text().split()


CONTENTS = {
    "one line": "word " * 3000,
    "one line without spaces": "x" * 9000,
    "many lines": "a line\n" * 20_000,
    "short": "a few words, and no more than that\n" * 60,
    "chinese": "中文字" * 5000,
    "blank lines with spaces": "a paragraph of words \n \t\n" * 2000,
    "a long line": "long " * 400_000 + "\n",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_any_plain_text_gives_both_splits_and_loses_nothing(name: str, tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text(CONTENTS[name])
    text = found(file)
    made = everything(text)
    assert sorted("".join(made)) == sorted(CONTENTS[name])
    assert max(len(piece.text) for piece in text.pieces()) <= pieces_module.LONGEST
    windows_form = tmp_path / "windows.txt"
    windows_form.write_bytes(b"\xef\xbb\xbf" + CONTENTS[name].replace("\n", "\r\n").encode())
    assert found(windows_form).digest == text.digest


# What is no text


def test_what_holds_no_text_is_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.txt", ["x" * 3000, "y" * 3000])
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.4 as good as text")
    (tmp_path / "d.bin").write_bytes(b"\0\1\2")
    (tmp_path / "empty.md").touch()
    assert len(everything(found(tmp_path))) == 2
    assert "1 files are read; left out: b.png, c.pdf, d.bin (no text)" in capsys.readouterr().err
    for name in ("b.png", "c.pdf", "d.bin"):
        with pytest.raises(
            ConfigError, match=rf"{name}' holds no text: {name}\. txt, md, jsonl, json, csv, parquet and"
        ):
            found(tmp_path / name)


def test_a_readme_beside_rows_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.parquet", ROWS)
    (tmp_path / "README.md").write_text("# About")
    assert everything(found(tmp_path)) == sorted(ROWS)
    assert "left out: README.md (data.path may be a glob)" in capsys.readouterr().err


def broken(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20] if file.suffix == ".gz" else b'{"text": "a"}\n{"text": ')


@pytest.mark.parametrize("form", ["a.jsonl", "a.parquet", "a.arrow", "a.jsonl.gz", "a.parquet.gz", "a.txt.gz"])
def test_a_file_that_is_damaged_is_named(form: str, tmp_path: Path) -> None:
    broken(write(tmp_path / form, ROWS))
    with pytest.raises(ConfigError, match=rf"{form}' cannot be read as \w+ \(.+\): mend it, or move it away"):
        found(tmp_path)


@pytest.mark.parametrize("offset", [0, 3, 1 << 20, (1 << 20) + 1])
def test_the_first_byte_that_is_not_utf8_is_named(offset: int, tmp_path: Path) -> None:
    content = ("é" * (offset // 2) + "x" * (offset % 2)).encode() + b"\xe9 more"
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.txt' is not UTF-8 text \(.* at byte {offset}\)"):
        found(tmp_path / "a.txt")


def test_the_column_with_the_text(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"title": ["a"] * 30, "body": ROWS[:30], "year": [1] * 30})
    file = tmp_path / "a.parquet"
    rows.to_parquet(file)
    assert everything(found(file, column="body")) == sorted(ROWS[:30])
    with pytest.raises(
        ConfigError, match=r"Give data\.column; columns: title \(string\), body \(string\), year \(int64\)"
    ):
        found(file)
    with pytest.raises(ConfigError, match=r"data\.column='bdy' is not in .*, did you mean 'body'\?; columns: title"):
        found(file, column="bdy")
    with pytest.raises(ConfigError, match=r"data\.column='year' of .* holds no strings; columns: title"):
        found(file, column="year")


def test_rows_without_text(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text(json.dumps({f"token{number}": number for number in range(20)}))
    with pytest.raises(ConfigError, match=r"has no column of strings; columns: token0 \(int64\), .* and 8 more$"):
        found(tmp_path)


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set."""
    calls = list[tuple[Any, ...]]()

    def load(*arguments: Any) -> Any:
        calls.append(arguments)
        if arguments[1] not in (None, "en"):
            raise ValueError(f"BuilderConfig '{arguments[1]}' not found. Available: ['en']")
        rows = {"train": ROWS[:30], "validation": ROWS[30:]}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in rows.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_data_set_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    assert documents(found("owner/name", source="hub", name="en")) == {"train": ROWS[:30], "test": ROWS[30:]}
    assert hub == [("owner/name", "en")]
    chosen = found("owner/name", source="hub", train_glob="validation", test_glob="train", column="text")
    assert documents(chosen) == {"train": ROWS[30:], "test": ROWS[:30]}
    with pytest.raises(ConfigError, match=r"data set 'owner/name', data\.name=de: .*Available: \['en'\]"):
        found("owner/name", source="hub", name="de")


@pytest.mark.parametrize("path", ["./texts", "/data/texts", "~/texts", "texts.jsonl", "a/b/c", "some texts"])
def test_a_path_never_goes_to_the_hub(path: str, hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ConfigError, match="is no name of a data set on the hub"):
        found(path, source="hub")
    for source in ("files", "wikitext"):
        with pytest.raises(ConfigError, match="does not exist"):
            found(path, source=source)
    assert hub == []


def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(ConfigError, match=r"data set 'nobody/nothing' is neither here .* hub cannot be reached"):
        found("nobody/nothing", source="hub")


def test_a_repository_with_a_readme_that_names_its_files(tmp_path: Path) -> None:
    write(tmp_path / "x" / "one.jsonl", ROWS[:30])
    write(tmp_path / "x" / "two.jsonl", ROWS[30:])
    write(tmp_path / "never.jsonl", ["never"])
    card = ["---", "license: mit", "configs:", "- config_name: en", "  data_files:"]
    card += ["  - split: train", "    path: x/one.jsonl", "  - split: test", "    path: x/two.jsonl", "---"]
    (tmp_path / "README.md").write_text("\n".join(card))
    for name in ("en", None):
        assert documents(found(tmp_path, name=name)) == {"train": ROWS[:30], "test": ROWS[30:]}
    with pytest.raises(ConfigError, match=r"data\.name=de: .*'en'"):
        found(tmp_path, name="de")


def test_hidden_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / ".b.jsonl")
    assert everything(found(tmp_path)) == sorted(ROWS)


OURS = """
from twist_fl import Part

def parts(config, meter):
    meter.say(f"reading {config.path}")
    return [Part("train", lambda: iter(["one", "two"])), Part("test", lambda: iter(["three"]))]

def one(config, meter):
    return [Part("all", lambda: iter(f"document {i}" for i in range(20)))]

def lines(config, meter):
    return [Part("train", lambda: iter(["one ", "two"]), lines=True), Part("test", lambda: iter(["three"]))]

def empty(config, meter): return []
def silent(config, meter): return [Part("all", lambda: iter([]))]
def words(config, meter): return ["one", "two"]
def bare(config): ...
"""


def test_a_users_source_is_read_as_ours_are(user_module: Callable[[str], str], tmp_path: Path) -> None:
    module = user_module(OURS)
    text = found("anything", source=f"{module}:parts")
    assert documents(text) == {"train": ["one", "two"], "test": ["three"]}
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", ["one", "two"])
    write(tmp_path / "data" / "test.jsonl", ["three"])
    assert found(tmp_path / "data").digest == text.digest
    assert everything(found("anything", source=f"{module}:one")) == sorted(f"document {i}" for i in range(20))
    read = found("anything", source=f"{module}:lines").pieces()
    assert [piece[:3] for piece in read] == [("one ", False, True), ("two", False, True), ("three", True, False)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "data.source='M:empty' gave [], expected a list of twist_fl.Part"),
        ("words", "data.source='M:words' gave ['one', 'two'], expected a list of twist_fl.Part"),
        ("silent", "data.path='anything' holds no text"),
        ("bare", "data.source='M:bare' must be a function (config, meter) -> parts, found bare(config): too many "
         "positional arguments"),
        ("none", "data.source='M:none': the module M has no none"),
    ],
)  # fmt: skip
def test_a_users_source_that_gives_no_text_is_refused(
    name: str, reason: str, user_module: Callable[[str], str]
) -> None:
    module = user_module(OURS)
    with pytest.raises(ConfigError) as caught:
        found("anything", source=f"{module}:{name}")
    assert str(caught.value) == reason.replace("M", module)


def test_a_node_without_the_source_says_what_to_install_and_where() -> None:
    text = RunText(DataConfig(source="not_here:parts"), 1, "0" * 32)
    with pytest.raises(ConfigError, match=r"not_here.*: install it on every node, or name its folder in PYTHONPATH"):
        text.open()


def test_the_builtin_text_is_parsed_once_a_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path))
    found = builtin_text.documents.__wrapped__()
    assert len(found) > 100
    with monkeypatch.context() as patch:
        patch.setattr(builtin_text, "_docstrings", None)  # nobody parses again
        assert builtin_text.documents.__wrapped__() == found
    (kept,) = (tmp_path / "builtin").iterdir()
    (kept / "documents.json").write_bytes((kept / "documents.json").read_bytes().replace(b"Python", b"Pythoy", 1))
    assert builtin_text.documents.__wrapped__() == found
    check_seal(kept)
