"""The report: whole, self-contained and escaped HTML that holds the table's numbers, and figures that show the data."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from html_page import Page, assert_one_file_for_a_phone
from hypothesis import given
from hypothesis import strategies as st
from legible import assert_legible
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from omegaconf import OmegaConf
from rich.console import Console

from twist_fl.config.schema import load_config
from twist_fl.report import plots
from twist_fl.report.cells import MAX_COLUMNS, fit, markdown, narrow, terminal_table, turned, uncut_table
from twist_fl.report.compare import comparison_table, read_runs
from twist_fl.report.conclusions import conclusions
from twist_fl.report.glossary import ALGORITHMS, WORDS
from twist_fl.report.page import figures, write_report
from twist_fl.report.tables import device_tables, memory_cells, perplexity_cells, run_tables, sent_cells
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.units import duration_text

SIZES = (8, 6, 4, 3)
MakeRun = Callable[..., RunFolder]


def log_rounds(folder: RunFolder, num_rounds: int, loss: float, rng: random.Random) -> None:
    for round_ in range(1, num_rounds + 1):
        folder.log(
            "round",
            round=round_,
            loss=loss + 4 * math.exp(-6 * round_ / num_rounds) + rng.gauss(0, 0.08),
            dropped={},
            seconds=2.5,
            bytes_down={"weights": 1_000_000, "moments": 300_000, "other": 50},
            bytes_up={"weights": 1_000_000, "moments": 200_000, "other": 50},
        )
        if round_ % 10 == 0:
            full = math.exp(loss + 0.1 + 4 * math.exp(-6 * round_ / num_rounds))
            folder.log("eval", round=round_, full=full, subnets=full * 1.1)


def tickets(full: float, decay: float, draws: int, rng: random.Random) -> list[dict[str, Any]]:
    """Perplexities that grow as blocks go."""
    found = []
    for size in SIZES:
        mean = full * math.exp(decay * (1 - size / 12))
        values = [mean * math.exp(rng.gauss(0, 0.03)) for _ in range(draws)]
        found.append({"size": size, "of": 12, "num_sub": [size, size], "num_params": 10_000 * size,
                      "perplexities": values, "mean": fmean(values), "std": stdev(values) if draws > 1 else 0.0,
                      "min": min(values), "max": max(values)})  # fmt: skip
    return found


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(folder_name, *overrides, decay=0.5, ...)`: a finished run as the server writes it."""

    def make(name: str, *overrides: str, decay: float = 0.5, draws: int = 20, rounds: int = 60) -> RunFolder:
        folder, rng = RunFolder(tmp_path / name), random.Random(name)
        log_rounds(folder, rounds, 3.6, rng)
        full = 41.25
        results = {
            "twist_fl": "0.1.0", "commit": "0123abc+", "python": "3.11.7", "torch": "2.6.0",
            "hardware": {"processor": "A <fast> processor", "cores": 4, "gpu": None},
            "config": OmegaConf.to_container(OmegaConf.structured(load_config(overrides=overrides))),
            "corpus": "c0ffee", "rounds": rounds, "num_params": 880_128, "test_tokens": 16_384,
            "full": full, "tickets": tickets(full, decay, draws, rng) if draws else [],
        }  # fmt: skip
        folder.log("eval", round=rounds, full=full)
        folder.results_file.write_text(json.dumps(results))
        return folder

    return make


def pair(make_run: MakeRun) -> list[RunFolder]:
    return [make_run("a"), make_run("b", "algorithm=fedavg", decay=3.0)]


DEVICE: Mapping[str, Any] = {
    "name": "phone <1>", "memory_mb": 2.9, "size": 4, "of": 12, "num_params": 731_776, "weight_mb": 2.93,
    "bytes_received": 2_931_234, "perplexity": 49.87, "ms_per_token": 1.25, "prompt_tokens_per_second": 41_234.4,
    "peak_mb": 31.5,
}  # fmt: skip


def test_report_is_one_page_that_needs_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    write_report(pair(make_run), tmp_path / "new" / "report.html", [DEVICE])
    text = (tmp_path / "new" / "report.html").read_text(encoding="ascii")
    page = Page(text)
    assert_one_file_for_a_phone(page)
    assert page.tags.count("svg") == 3 and 'href="#' in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_report_holds_every_number_of_the_table(make_run: MakeRun, tmp_path: Path) -> None:
    runs = pair(make_run)
    write_report(runs, tmp_path / "report.html", [DEVICE])
    words = Page((tmp_path / "report.html").read_text()).words
    for cells in (run_tables(comparison_table(runs)) | device_tables([DEVICE])).values():
        for cell in [cell for line in cells for cell in line]:
            assert cell in words
    for cell in ("phone <1>", "4/12", "731,776", "2.93", "49.87", "41,234", "31.5", "A <fast> processor", "16,384"):
        assert cell in words


def change(run: RunFolder, full: float, of_4: float | None = None) -> None:
    """The results' full perplexity, and the mean of tickets of 4/12: without one, all tickets go."""
    results = json.loads(run.results_file.read_text())
    results["full"] = full
    if of_4 is None:
        results["tickets"] = []
    for ticket in results["tickets"]:
        if ticket["size"] == 4:
            ticket["mean"] = of_4
    run.results_file.write_text(json.dumps(results))


def test_the_conclusion_is_made_of_the_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", "algorithm=fedavg")]
    change(runs[0], 40.0, 50.0)
    change(runs[1], 20.0, 60.0)
    assert conclusions(read_runs(runs)) == [
        "The best full model is that of FedAvg: perplexity 20.00 (TwIST: 40.00, 2 times as much).",
        "The best random tickets with 4/12 of the blocks, not trained further, are those of TwIST: 50.00 on average, "
        "1.25 times its full model (FedAvg: 60.00, 3 times).",
    ]
    write_report(runs, tmp_path / "report.html")
    top = Page((tmp_path / "report.html").read_text()).words.partition("What the words mean")[0]
    assert all(sentence in top for sentence in conclusions(read_runs(runs))) and "lower is better" in top


def test_the_conclusion_of_one_run_of_none_that_drew_and_of_many(make_run: MakeRun) -> None:
    run = make_run("a")
    change(run, 40.0, 50.0)
    assert conclusions(read_runs([run]))[1] == (
        "Random tickets with 4/12 of the blocks, not trained further, have 50.00 on average, 1.25 times its full model."
    )
    change(run, 40.0)
    assert conclusions(read_runs([run])) == ["The full model has perplexity 40.00.", "No tickets were drawn."]
    many = [make_run(f"run{i}", f"name=r{i}") for i in range(6)]
    for i, each in enumerate(many):
        change(each, 10.0 + i, 20.0 + i)
    assert conclusions(read_runs(many))[0].endswith("perplexity 10.00 (the other 5 from 11.00 to 15.00).")


def test_the_conclusion_of_a_run_that_diverged_has_no_ratio(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b", "algorithm=fedavg")]
    change(runs[0], math.inf, math.inf)
    change(runs[1], 20.0, 60.0)
    full, tickets = conclusions(read_runs(runs))
    assert full.endswith("perplexity 20.00 (TwIST: inf).")
    assert tickets.endswith("60.00 on average, 3 times its full model (TwIST: inf).")


def test_the_words_are_explained_and_lower_is_better_wherever_there_is_perplexity(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = pair(make_run)
    write_report(runs, tmp_path / "report.html", [DEVICE])
    page = Page((tmp_path / "report.html").read_text())
    for word, meaning in (WORDS | dict(ALGORITHMS[name] for name in ("twist", "fedavg"))).items():
        assert f"{word}{meaning}" in page.words
    assert ALGORITHMS["ddp"][1] not in page.words
    said = re.findall(r"<(caption|figcaption)>(.*?)</\1>", page.source, re.DOTALL)
    about = [text for _, text in said if "erplexity" in text]
    assert len(about) >= 6 and all("lower is better" in text for text in about)
    for draw in plots.drawings(read_runs(runs)).values():
        labels = [axes.get_ylabel() for axes in draw(read_runs(runs)).axes if "perplexity" in axes.get_ylabel()]
        assert labels and all(label.endswith("(lower is better)") for label in labels)


def test_lost_replies_are_told_in_words(make_run: MakeRun, tmp_path: Path) -> None:
    """As the results count them; as the log does where they do not."""
    runs = [make_run("a", rounds=3), make_run("b", "algorithm=fedavg")]
    runs[0].log(**runs[0].events("round")[0] | {"round": 3, "dropped": {"1": "late"}})
    counted = json.loads(runs[1].results_file.read_text()) | {"lost_replies": 2}
    runs[1].results_file.write_text(json.dumps(counted))
    assert [row[-1] for row in sent_cells(comparison_table(runs))] == ["replies lost", "1", "2"]
    write_report(runs, tmp_path / "report.html")
    top = Page((tmp_path / "report.html").read_text()).words.partition("What the words mean")[0]
    assert "TwIST: 1 reply of workers did not count" in top and "FedAvg: 2 replies of workers did not count" in top
    write_report([make_run("c")], tmp_path / "report.html")
    assert "did not count;" not in Page((tmp_path / "report.html").read_text()).words


CELLS = st.tuples(st.integers(1, 30), st.integers(1, 30)).map(
    lambda shape: [[f"{line}.{column}" for column in range(shape[1])] for line in range(shape[0])]
)


def test_the_title_of_a_narrow_table_is_as_wide_as_the_terminal() -> None:
    out, title = StringIO(), "Models on devices: what each received and holds"
    Console(file=out, width=60).print(terminal_table(title, [["device", "phone"], ["MB", "2"]]))
    assert out.getvalue().startswith(title + "\n")


@given(st.integers(32, 100))
def test_a_narrow_terminal_cuts_no_number(width: int) -> None:
    out, numbers = StringIO(), ["341,760", "14.97", "0.11", "14.80", "15.13"]
    header = ["blocks", "parameters", "mean", "std", "min", "max"]
    Console(file=out, width=width).print(uncut_table([header, ["8/12", *numbers]]))
    body = out.getvalue().split("┩")[-1]
    columns = zip(*(line[1:-1].split("│") for line in body.splitlines() if line.startswith("│")), strict=True)
    assert ["".join(parts).replace(" ", "") for parts in columns] == ["8/12", *numbers]


@given(CELLS)
def test_a_table_of_any_size_fits_and_keeps_every_cell_beside_its_name(cells: list[list[str]]) -> None:
    found = [pair for part in fit(cells) for line in part for pair in [(line[0], cell) for cell in line]]
    sideways = [pair for part in fit(cells) for line in turned(part) for pair in [(line[0], cell) for cell in line]]
    assert all(len(line) <= MAX_COLUMNS for part in fit(cells) for line in part)
    assert {(line[0], cell) for line in cells for cell in line} <= set(found) | set(sideways)
    assert {cell for _, cell in found} == {cell for line in cells for cell in line}
    assert all(line.count("|") <= MAX_COLUMNS + 1 for line in markdown(cells).splitlines())
    assert turned(turned(cells)) == cells and narrow(cells) in (cells, turned(cells))
    assert len(narrow(cells)[0]) <= len(narrow(cells))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_no_table_of_a_report_has_more_than_six_columns(make_run: MakeRun, tmp_path: Path, count: int) -> None:
    runs = [make_run(f"run{i}", f"seed={i}") for i in range(count)]
    write_report(runs, tmp_path / "report.html", [DEVICE])
    tables = re.findall(r"<table.*?</thead>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert len(tables) >= 6
    assert all(table.count("<th ") <= MAX_COLUMNS and "<caption>" in table for table in tables)


def test_comparison_table_sums_what_was_logged(make_run: MakeRun) -> None:
    runs = pair(make_run)
    twist, fedavg = comparison_table(runs)
    assert (twist.label, fedavg.label) == ("TwIST", "FedAvg")
    assert twist.full == 41.25
    assert list(twist.tickets) == ["8/12", "6/12", "4/12", "3/12"]
    first = json.loads(runs[0].results_file.read_text())["tickets"][0]
    assert twist.tickets["8/12"] == (first["mean"], first["std"])
    assert (twist.weight_bytes, twist.moment_bytes, twist.seconds) == (120_000_000, 30_000_000, 150.0)
    assert sent_cells([twist])[1] == ["TwIST", "120.0 MB", "-", "30.0 MB", "6.0 kB", "0"]
    assert memory_cells([twist])[1] == ["TwIST", "-", "-", "2 min 30 s"]
    assert perplexity_cells([twist])[0] == ["blocks kept", "all (full model)", "8/12", "6/12", "4/12", "3/12"]


def test_the_largest_peak_of_all_rounds_stands_beside_the_predicted(make_run: MakeRun) -> None:
    folder = make_run("a", rounds=1)
    round_ = folder.events("round")[0]
    for peak in (70_000_000, 95_000_000, 80_000_000):
        folder.log(**round_ | {"peak_bytes": peak, "predicted_peak_bytes": 72_500_000})
    assert memory_cells(comparison_table([folder]))[1][1:3] == ["95.0 MB", "72.5 MB"]


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        ([[], ["algorithm=fedavg"]], ["TwIST", "FedAvg"]),
        ([[], ["train.optimizer_state=server"]], ["TwIST, moments: reset", "TwIST, moments: server"]),
        ([["name=x"], ["name=y"], ["algorithm=fedavg"]], ["TwIST (x)", "TwIST (y)", "FedAvg"]),
        ([[], ["algorithm=ddp", "train.optimizer_state=server"]], ["TwIST, moments: reset", "DDP"]),
        ([["seed=0"], ["seed=1"]], ["TwIST (run0)", "TwIST (run1)"]),
    ],
)
def test_labels_tell_runs_apart(make_run: MakeRun, overrides: list[list[str]], labels: list[str]) -> None:
    runs = [make_run(f"run{i}", *each) for i, each in enumerate(overrides)]
    assert [row.label for row in comparison_table(runs)] == labels


def test_ddp_is_drawn_by_intervals(make_run: MakeRun) -> None:
    """Its rounds are batches: on one axis with the others, 15 of them are one interval."""
    twist, ddp = read_runs([make_run("a"), make_run("b", "algorithm=ddp", rounds=900)])
    assert (ddp.intervals[14], ddp.intervals[-1]) == (1, 60) == (twist.intervals[0], twist.intervals[-1])
    assert max(ddp.full_by_interval) == max(twist.full_by_interval) == 60
    assert plots.smoothing_rounds([twist, ddp]) == plots.smoothing_rounds([twist])


def test_predicted_bytes_are_those_of_each_round_where_rounds_differ(make_run: MakeRun) -> None:
    folder = make_run("a", rounds=1)
    folder.log(**folder.events("round")[0] | {"round": 1, "predicted_bytes": 7})
    (run,) = read_runs([folder])
    assert run.predicted_bytes == run.predicted_round_bytes + 7


def test_the_same_run_twice_is_numbered(make_run: MakeRun) -> None:
    run = make_run("a")
    assert [row.label for row in comparison_table([run, run])] == ["TwIST (#1)", "TwIST (#2)"]


def test_names_cannot_inject_markup_or_mathematics(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b")]
    for run, name in zip(runs, ('<b>x & $y$ -- id="z" http://example.org', "<b>y"), strict=True):
        results = json.loads(run.results_file.read_text())
        results["config"]["name"] = name
        run.results_file.write_text(json.dumps(results))
    write_report(runs, tmp_path / "report.html", [{"name": "<b>z"}], title="<b>title")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "b" not in page.tags[page.tags.index("table") :]
    assert "<b>title" in page.words
    assert page.words.count('TwIST (<b>x & $y$ -- id="z" http://example.org)') >= 3
    assert not any("example.org" in value for _, _, value in page.attributes)
    assert len(figures(runs, tmp_path / "png")) == 3


def test_differences_are_listed_and_the_folder_is_not(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a", "dir=/secret/a"), make_run("b", "dir=/secret/b", "train.lr=0.25", "seed=7")]
    write_report(runs, tmp_path / "report.html")
    words = Page((tmp_path / "report.html").read_text()).words
    differences = words.partition("runs differ")[2].partition("All settings")[0]
    assert "train.lr" in differences
    assert "0.25" in differences
    assert "train.epochs" not in differences
    assert "Seed: 0 / 7, in the order of the table." in words
    assert "/secret" not in words


def test_figures_are_png_files_that_show_something(make_run: MakeRun, tmp_path: Path) -> None:
    written = figures(pair(make_run), tmp_path / "figures")
    assert [path.name for path in written] == ["perplexity_vs_kappa.png", "tickets.png", "training.png"]
    for path in written:
        pixels = imread(path)
        assert pixels.shape[1] == plots.WIDTH * plots.DPI
        assert pixels.std() > 0.05


@pytest.mark.parametrize("count", [1, 2, 9])
def test_figures_of_many_runs_are_legible(make_run: MakeRun, count: int) -> None:
    """However long their names."""
    names = [f"name={i}-of-a-run-whose-name-is-long-but-says-something" for i in range(count)]
    runs = read_runs([make_run(f"run{i}", name, decay=i / 3) for i, name in enumerate(names)])
    for draw in plots.drawings(runs).values():
        with plots.styled():
            assert_legible(draw(runs))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda axes: axes.text(0.5, 0.5, "a") and axes.text(0.5, 0.5, "b"), "'a' and 'b' overlap"),
        (lambda axes: axes.set_ylabel("long " * 99), "is clipped"),
        (lambda axes: axes.set_xlabel("small", fontsize=7), "'small' has 7"),
        (lambda axes: axes.set_ylabel(""), "a row without a label"),
    ],
)
def test_what_is_not_legible_is_found(spoil: Callable[[Axes], Any], message: str) -> None:
    with plots.styled():
        figure = plots.figure_of(3.0, plots.looks_of(("one", "two")))
        axes = figure.subplots()
        axes.set_xlabel("x")
        axes.set_ylabel("y")
        assert_legible(figure)
        spoil(axes)
        with pytest.raises(AssertionError, match=message):
            assert_legible(figure)


def test_runs_are_told_apart_without_colour(make_run: MakeRun) -> None:
    """By the marker and the line, also on the curve of the training loss."""
    looks = plots.looks_of(map(str, range(32))).values()
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == 32
    runs = read_runs([make_run("a"), make_run("b"), make_run("c")])
    loss, perplexity = plots.draw_training(runs).axes
    for axes in (loss, perplexity):
        marked = [line for line in axes.lines if line.get_marker() not in ("None", None)]
        assert len({line.get_marker() for line in marked}) == 3


def test_perplexity_while_training_says_how_much_of_the_test_split(make_run: MakeRun, tmp_path: Path) -> None:
    """Which is less than the final results': the curve ends elsewhere than the table."""
    runs = [make_run("a", "eval.watch_windows=16"), make_run("b", "eval.watch_windows=48")]
    write_report(runs, tmp_path / "report.html")
    assert "on the test split's first 16 to 48 windows" in Page((tmp_path / "report.html").read_text()).words


def test_runs_without_flower_say_that_nothing_was_sent(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", rounds=1)
    moved = {"seconds": 2.0, "loss": 4.0, "dropped": {}, "predicted_bytes": 500_000}
    event = {"event": "round", "round": 1, "bytes_down": {}, "bytes_up": {}, **moved}
    run.events_file.write_text(json.dumps(event) + "\n")
    assert sent_cells(comparison_table([run]))[1][1:] == ["-", "500.0 kB", "-", "-", "0"]
    write_report([run], tmp_path / "report.html")
    assert "Nothing was sent" in Page((tmp_path / "report.html").read_text()).words


def test_a_long_key_breaks_after_its_full_stop(make_run: MakeRun, tmp_path: Path) -> None:
    write_report([make_run("a"), make_run("b", "blueprint.num_sub=4")], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert '<th scope="row"><span>blueprint.<wbr>num_sub</span></th>' in text
    assert "blueprint.num_sub" in Page(text).words


def test_provenance_is_one_column(make_run: MakeRun, tmp_path: Path) -> None:
    """What all runs share stands once, what differs for each run."""
    write_report([make_run("a"), make_run("b", "seed=7"), make_run("c")], tmp_path / "report.html")
    words = Page((tmp_path / "report.html").read_text()).words.partition("Provenance")[2]
    assert words.count("0123abc+") == 1 and "seed0 / 7 / 0, in the order of the table" in words


def test_a_run_without_tickets_has_no_figure_of_them(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", draws=0)
    assert [path.stem for path in figures([run], tmp_path / "figures")] == ["perplexity_vs_kappa", "training"]
    write_report([run], tmp_path / "report.html")
    assert "No tickets were drawn" in Page((tmp_path / "report.html").read_text()).words


def test_rounds_that_failed_and_single_draws_are_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", draws=1, rounds=3)
    run.log("round", round=3, loss=math.nan, dropped={"0": "late"}, seconds=1.0, bytes_down={}, bytes_up={})
    write_report([run], tmp_path / "report.html")
    words = Page((tmp_path / "report.html").read_text()).words
    assert "TwIST: 1 reply of workers did not count" in words
    assert not re.search(r"\bnan\b", words)


def drawn(axes: Axes, line: int = 0) -> tuple[list[float], list[float]]:
    x, y = axes.lines[line].get_data()
    return np.asarray(x).tolist(), np.asarray(y).tolist()


def test_curves_hold_the_logged_values(make_run: MakeRun) -> None:
    run = make_run("a")
    loss, perplexity = plots.draw_training(read_runs([run])).axes
    assert drawn(loss) == (list(range(1, 61)), [each["loss"] for each in run.events("round")])
    rounds, perplexities = drawn(perplexity)
    assert rounds == [10, 20, 30, 40, 50, 60]
    assert perplexities[-1] == 41.25


def test_tickets_run_from_small_to_the_full_model(make_run: MakeRun) -> None:
    axes = plots.draw_perplexity_vs_kappa(read_runs([make_run("a")])).axes[0]
    kappas, perplexities = drawn(axes)
    assert kappas == [3 / 12, 4 / 12, 6 / 12, 8 / 12, 1]
    assert perplexities[-1] == 41.25
    assert axes.get_yscale() == "linear"
    assert {label.get_text() for label in axes.get_xticklabels()} == {"3/12", "4/12", "6/12", "8/12", "12/12"}


def test_a_wide_range_is_logarithmic(make_run: MakeRun) -> None:
    figure = plots.draw_perplexity_vs_kappa(read_runs(pair(make_run)))
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("decay", [0.5, 3.0])
def test_panels_of_tickets_have_one_scale(make_run: MakeRun, decay: float) -> None:
    """Also logarithmic, where the range needs it."""
    runs = read_runs([make_run("a"), make_run("b", "algorithm=fedavg", decay=decay)])
    panels = plots.draw_tickets(runs).axes
    assert len(panels) == 4
    assert len({(axes.get_ylim(), axes.get_yscale()) for axes in panels}) == 1
    assert panels[0].get_yscale() == ("log" if decay == 3.0 else "linear")
    drawn = [value for run in runs for ticket in run.tickets for value in ticket["perplexities"]]
    assert panels[0].get_ylim()[0] <= min(drawn) <= max(drawn) <= panels[0].get_ylim()[1]


@given(st.floats(0.01, 1e5), st.floats(3, 1e5))
def test_logarithmic_axes_have_enough_ticks_and_not_too_many(low: float, factor: float) -> None:
    ticks = plots.log_ticks(low, low * factor)
    assert 3 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * factor for tick in ticks)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.sampled_from([1, 3, 7]))
def test_smoothing_stays_within_the_values_and_keeps_constants(values: list[float], width: int) -> None:
    result = plots.smoothed(values, width)
    assert len(result) == len(values)
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in result)
    assert plots.smoothed([2.0] * len(values), width) == [2.0] * len(values)
    assert plots.smoothed(values, 1) == values


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.25, "1.2 s"), (61, "1 min 1 s"), (3599.7, "1 h 0 min"), (11_220, "3 h 7 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_unfinished_run_is_refused_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    unfinished = RunFolder(tmp_path / "half")
    unfinished.log("round", round=1)
    for act in (
        lambda: comparison_table([make_run("a"), unfinished]),
        lambda: figures([unfinished], tmp_path),
        lambda: write_report([unfinished], tmp_path / "report.html"),
    ):
        with pytest.raises(ConfigError, match=r"half has no results.json.*not finished"):
            act()
    assert not (tmp_path / "report.html").exists()


def test_no_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="no runs"):
        comparison_table([])


def test_no_figure_is_left_open(make_run: MakeRun, tmp_path: Path) -> None:
    """The object interface keeps no global list of figures."""
    from matplotlib import pyplot

    figures([make_run("a")], tmp_path)
    assert isinstance(plots.draw_training(read_runs([make_run("b")])), Figure)
    assert pyplot.get_fignums() == []
