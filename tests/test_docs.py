"""README and docs: tables fit a page and are the published ones, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from twist_fl.cli.app import app
from twist_fl.config.schema import Config, load_config
from twist_fl.config.sizes import layout_of, make_division
from twist_fl.model.hf_config import model_config
from twist_fl.report.cells import MAX_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "gpu" / "README.md"]
MARKED = re.compile(r"<!-- table: (results/.*?) -->\n(.*?)<!-- /table -->", re.DOTALL)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tables(text: str) -> list[list[str]]:
    """Their lines."""
    return [found.splitlines() for found in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)]


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = [(page, line) for page in PAGES for line in commands(page.read_text())]
OURS = [pytest.param(line, id=f"{named(page)}: {line[:60]}") for page, line in COMMANDS if line.startswith("twist-fl ")]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tables_have_at_most_six_columns_and_whole_lines(page: Path) -> None:
    for table in tables(page.read_text()):
        assert {columns(line) for line in table} == {columns(table[0])}, table[0]
        assert columns(table[0]) <= MAX_COLUMNS, table[0]


def test_wide_tables_and_broken_lines_are_found() -> None:
    (wide,) = tables("text\n| a | b | c | d | e | f | g |\n|---|---|---|---|---|---|---|\n\ntext")
    assert [columns(line) for line in wide] == [7, 7]
    (broken,) = tables("| a | b |\n|---|---|\n| |C| | d |\n")
    assert [columns(line) for line in broken] == [2, 2, 4]
    assert columns(r"| \|C\| | d |") == 2


def test_tables_of_results_are_the_published_ones() -> None:
    """Of a table.md, as a whole or some of its tables."""
    found = [(name, text) for page in PAGES for name, text in MARKED.findall(page.read_text())]
    assert {name for name, _ in found} >= {"results/demo/table.md", "results/wikitext2/table.md"}
    for name, text in found:
        assert text.startswith("**Test perplexity (lower is better)")
        assert text in (ROOT / name).read_text(), name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for name, anchor in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, anchor


def test_the_readme_leads_to_every_page() -> None:
    """In one step or two."""
    seen = [ROOT / "README.md"]
    for page in seen:
        links = [page.parent / name for name in re.findall(r"\]\(([^):#]+\.md)", page.read_text())]
        seen += [link.resolve() for link in links if link.resolve() not in seen]
    assert {page.resolve() for page in PAGES} - set(seen) == set()


@pytest.mark.parametrize("line", OURS)
def test_every_command_of_ours_is_one_that_exists(line: str) -> None:
    _, name, *rest = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    if rest and rest[0] in getattr(command, "commands", {}):
        command, *rest = command.commands[rest[0]], *rest[1:]
    parsed = command.make_context(name, list(rest))
    if (
        name in ("train", "cost")
        and "--resume" not in rest
        and not parsed.params["preset"].startswith(("runs/", "model.gguf"))
    ):
        divides(load_config(parsed.params["preset"], parsed.params["overrides"] or []))


def divides(config: Config) -> None:
    """Raises ValueError if the workers cannot hold what they are to hold; of a checkpoint only the run knows, of the
    reader's policy, which is not here, the reader."""
    if config.model.pretrained is None:
        coverage = config.algorithm == "twist" and ":" not in config.blueprint.policy
        layout = layout_of(config, model_config(config).to_dict())
        make_division(config, layout).check(layout, coverage)


def test_make_and_flwr_are_given_what_they_know() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for _, line in COMMANDS if line.startswith("make ")} <= targets
    keys = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    given = [
        re.search(r"--run-config '(.*?)'", line)
        for _, line in COMMANDS
        if re.match(r"(FLWR_HOME=\S+ )?flwr run ", line)
    ]
    assert len(given) >= 3 and all(given)
    for found in given:
        assert found
        pairs = [word.partition("=")[::2] for word in shlex.split(found[1])]
        assert {key for key, _ in pairs} <= keys.keys()
        values = dict(pairs)
        divides(load_config(values.get("preset", "demo"), values["overrides"].split()))
