"""The paper's tables and figures: what they ask for, and that what they show is what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from legible import assert_legible
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.division import Division, Setting
from twist_fl.blueprint.drawing import draw_round
from twist_fl.experiments import fig2, fig5, fig6, shared, table1
from twist_fl.experiments.catalog import PAPER
from twist_fl.experiments.lab import ALIKE, TRAIN, Lab, Scale, Task, train
from twist_fl.experiments.latency import FULL, MEASURE, SIZES, shape_name
from twist_fl.experiments.measures import MEASURES
from twist_fl.experiments.runner import execute
from twist_fl.experiments.runs import DDP, twist
from twist_fl.report.cells import MAX_COLUMNS
from twist_fl.report.plots import styled
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import write_text
from twist_fl.training.job import make_job

MICRO = Scale(
    "micro",
    "demo",
    (
        *("model.n_layer=3", "model.n_embd=24", "model.n_positions=16", "data.window=16", "data.vocab_size=300"),
        *("blueprint.undivided_first=1", "train.rounds=2", "train.interval=2", "train.batch_size=2"),
        *("train.device=cpu", "train.threads=1", "eval.tickets=2", "eval.sizes=[6]", "eval.max_windows=8"),
        *ALIKE,
    ),
    3,
    "local",
    "seconds",
)
EXPERIMENTS = {experiment.name: experiment for experiment in PAPER}
NAMES = list(EXPERIMENTS)


# -- results that no training gave: known numbers in the right form


def fake(lab: Lab, task: Task) -> None:
    if task.kind == TRAIN:
        folder = lab.run(task.name)
        if task == DDP:  # the FLOPs of Figure 6 are those of its job
            folder.create(make_job(lab.config(task)))
        else:
            write_text(json.dumps({"run_id": task.name}), folder.job_file)
        write_text(json.dumps({"full": full_of(task.name)}), folder.results_file)
        folder.log("done")
        return
    result = {"tickets": fake_tickets, "prune": fake_prune, "latency": fake_latency}[task.kind](task)
    write_text(json.dumps({"of": dict.fromkeys(task.runs, task.runs[0]), "result": result}), lab.file(task))


def full_of(run: str) -> float:
    return 30.0 + (0 if run == "ddp" else int(run.rpartition("-")[2]))


def mean_of(run: str, size: int) -> float:
    """DDP's tickets degrade faster than TwIST's, those of small training sizes least."""
    trained = 24 if run == "ddp" else int(run.rpartition("-")[2])
    return full_of(run) * exp(0.02 * trained * (12 - size) / 4)


def fake_tickets(task: Task) -> dict[str, Any]:
    rng = np.random.default_rng(len(task.name))
    rows = []
    for size in task.arguments["sizes"]:
        mean = mean_of(task.runs[0], size)
        values = (mean * np.exp(rng.normal(0, (12 - size) / (20 if task.runs[0] == "ddp" else 100), 20))).tolist()
        row = {"size": size, "of": 12, "perplexities": values, "mean": mean, "std": float(np.std(values))}
        rows.append(row | {"min": min(values), "max": max(values)})
    return {"tickets": rows}


def prune_of(method: str, size: int) -> float:
    return 31.0 + (12 - size) ** 2 * (1 + 3 * list(table1.PRUNERS.values()).index(method))


def fake_prune(task: Task) -> dict[str, Any]:
    given = task.arguments
    return {
        "perplexity": prune_of(given["method"], given["size"]),
        "seconds": 1.5,
        "peak_bytes": 12_000_000,
        "calibration_tokens": 0 if given["method"] == "magnitude" else 16384,
        "notes": ["damped more"] if given["method"] == "sparsegpt" and given["size"] == 3 else [],
    }


SHAPES = [FULL, *(shape_name(setting, size) for setting in get_args(Setting) for size in SIZES)]


def ms_of(shape: str) -> float:
    kind, _, size = shape.partition(" ")
    return {"DDP": 28.0, "ffn": 32.0, "attn": 30.0, "both": 26.0}[kind] + int(size.partition("/")[0])


def fake_latency(task: Task) -> dict[str, Any]:
    return {
        "ms": {shape: ms_of(shape) for shape in SHAPES},
        **{"turns": 9, "batches": 15, "tokens": 512, "device": "cpu", "threads": 1, "num_params": 500_000},
        "hardware": {"processor": "a processor", "cores": 4, "gpu": None},
    }


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Every task of the catalog done."""
    lab = Lab(tmp_path_factory.mktemp("lab"), MICRO)
    for experiment in EXPERIMENTS.values():
        for task in experiment.tasks(lab):
            if not lab.is_done(task):
                fake(lab, task)
    return lab


@pytest.fixture(scope="module")
def collected(faked: Lab) -> dict[str, dict[str, Any]]:
    return {name: experiment.collect(faked) for name, experiment in EXPERIMENTS.items()}


def only_table(name: str, data: dict[str, Any]) -> dict[str, list[str]]:
    """Of the first table, its lines by their first cell."""
    cells, *_ = EXPERIMENTS[name].tables(data).values()
    return {line[0]: line for line in cells}


# -- tasks


@pytest.mark.parametrize("name", NAMES)
def test_runs_come_before_what_measures_them(name: str) -> None:
    lab = Lab(Path("nowhere"), MICRO)
    tasks = EXPERIMENTS[name].tasks(lab)
    assert [task for task in tasks if tasks.count(task) > 1] == []
    for i, task in enumerate(tasks):
        assert task.kind == TRAIN or task.kind in MEASURES
        assert set(task.runs) <= {before.name for before in tasks[:i] if before.kind == TRAIN}


def test_equal_names_are_equal_tasks() -> None:
    """Whatever two experiments both need is done once, and nothing overwrites another's result."""
    lab = Lab(Path("nowhere"), MICRO)
    by_name: dict[str, Task] = {}
    for experiment in EXPERIMENTS.values():
        for task in experiment.tasks(lab):
            assert by_name.setdefault(task.name, task) == task
    kinds = [task.kind for task in by_name.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {TRAIN: 16, "tickets": 18, "prune": 60, "latency": 1}


def test_the_paper_trains_what_the_scales_can(tmp_path: Path) -> None:
    lab = Lab(tmp_path, MICRO)
    for size in (10, 8, 6, 4, 3):
        config = lab.config(twist("both", size))
        assert (config.blueprint.num_sub, config.blueprint.setting) == ([size], "both")
    assert lab.config(DDP).algorithm == "ddp"


# -- all tables and figures


@pytest.mark.parametrize("name", NAMES)
def test_data_is_plain_json(name: str, collected: dict[str, dict[str, Any]]) -> None:
    assert json.loads(json.dumps(collected[name])) == collected[name]


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_whole(name: str, collected: dict[str, dict[str, Any]]) -> None:
    found = EXPERIMENTS[name].tables(collected[name])
    assert found
    for text, cells in found.items():
        assert len({len(line) for line in cells}) == 1 and len(cells) > 1
        assert all(isinstance(cell, str) and cell for line in cells for cell in line)
        ours = not text.startswith("The same in the paper") and "computed" not in text
        assert name == "fig2" or not ours or "scale micro" in text
        assert not re.search("perplexity|loss", text) or "lower is better" in text
        assert len(set(cells[0])) == len(cells[0]) <= MAX_COLUMNS


@pytest.mark.parametrize("name", NAMES)
def test_notes_name_the_seed(name: str, collected: dict[str, dict[str, Any]]) -> None:
    notes = EXPERIMENTS[name].notes(collected[name])
    assert name == "fig2" or "seed 0" in " ".join(notes).lower()
    assert all(note.endswith(".") for note in notes)


@pytest.mark.parametrize("name", [name for name in NAMES if EXPERIMENTS[name].figures])
def test_figures_are_legible_and_say_seed_and_draws(name: str, collected: dict[str, dict[str, Any]]) -> None:
    (draw,) = EXPERIMENTS[name].figures.values()
    with styled():
        figure: Figure = draw(collected[name])
        assert_legible(figure)
    assert figure.get_figheight() <= 9
    assert figure.get_suptitle() == ""
    said = EXPERIMENTS[name].reading(collected[name])
    assert "seed" in said.lower() and said.endswith(".")
    assert ("3 random tickets a size; seed 0." in said) == (name not in ("fig2", "fig6"))


def test_a_scale_is_named_unless_it_is_the_papers() -> None:
    assert shared.caption("Text", {"about": {"scale": "paper"}}) == "Text"
    assert shared.caption("Text", {"about": {"scale": "tiny"}}) == "Text (scale tiny)"


def test_a_run_of_other_sizes_is_refused(tmp_path: Path) -> None:
    lab = Lab(tmp_path, MICRO)
    task = shared.tickets(lab, DDP, "attn")
    row = {"size": 4, "of": 8, "perplexities": [1.0]}
    write_text(json.dumps({"of": {"ddp": "1"}, "result": {"tickets": [row]}}), lab.file(task))
    with pytest.raises(ConfigError, match="12 blocks a layer, ddp has 8: train with 12 heads"):
        shared.ticket_rows(lab, DDP, "attn")


def test_one_setting_needs_only_its_runs(faked: Lab, collected: dict[str, dict[str, Any]]) -> None:
    lab = replace(faked, overrides=("blueprint.setting=ffn",))
    tasks = EXPERIMENTS["table1"].tasks(lab)
    assert {task.name for task in tasks} < {task.name for task in EXPERIMENTS["table1"].tasks(faked)}
    assert sum(task.kind == TRAIN for task in tasks) == 5
    for name in ("table1", "table2"):
        data = EXPERIMENTS[name].collect(lab)
        assert all(len(cells) > 1 for cells in EXPERIMENTS[name].tables(data).values())
        assert EXPERIMENTS[name].notes(data)
    data = EXPERIMENTS["table1"].collect(lab)
    assert data["settings"] == {"ffn": collected["table1"]["settings"]["ffn"]}
    with styled():
        assert_legible(EXPERIMENTS["table1"].figures["table1"](data))


def test_a_setting_that_would_make_another_run_of_one_is_refused(faked: Lab) -> None:
    lab = replace(faked, overrides=("blueprint.setting=ffn",))
    with pytest.raises(ConfigError, match=r"would change twist-attn-6, which is blueprint.setting=attn: leave it out"):
        lab.words(twist("attn", 6))


# -- table 1


def test_table_1_takes_each_cell_from_its_run(collected: dict[str, dict[str, Any]]) -> None:
    data = collected["table1"]
    for setting in ("attn", "ffn", "both"):
        rows = data["settings"][setting]["rows"]
        for size in table1.SIZES:
            label = shared.label(size)
            assert rows["SE (DDP)"][label]["mean"] == mean_of("ddp", size)
            assert rows["TwIST SE"][label]["mean"] == mean_of(f"twist-{setting}-{size}", size)
            assert rows["TwIST SE_6/12"][label]["mean"] == mean_of(f"twist-{setting}-6", size)
            for method, code in table1.PRUNERS.items():
                assert rows[method][label]["mean"] == prune_of(code, size)


def test_table_1_shows_the_papers_numbers_beside_ours(collected: dict[str, dict[str, Any]]) -> None:
    found = EXPERIMENTS["table1"].tables(collected["table1"])
    what = "setting both, by blocks kept per layer"
    tables = found[f"Test perplexity (lower is better), {what} (scale micro)"], found[f"The same in the paper, {what}"]
    ours, paper = ({line[0]: line[1:] for line in cells} for cells in tables)
    assert ours["method"] == paper["method"] == ["8/12", "6/12", "4/12", "3/12"]
    assert ours["SparseGPT"] == ["47.00", "67.00", "95.00", "112.00"]
    assert paper["SparseGPT"] == ["16.60", "19.11", "31.64", "58.16"]
    assert paper["Magnitude"] == ["-"] * 4
    assert paper["SE (DDP)"][3] == "2,587" and "±" in ours["SE (DDP)"][0]


def test_table_1_has_one_scale_for_ours_and_one_for_the_papers(collected: dict[str, dict[str, Any]]) -> None:
    axes = table1.draw(collected["table1"]).axes
    assert len(axes) == 6
    for panels in (axes[::2], axes[1::2]):
        assert len({(panel.get_ylim(), panel.get_yscale()) for panel in panels}) == 1


def test_tickets_cost_nothing_after_training(collected: dict[str, dict[str, Any]]) -> None:
    found = EXPERIMENTS["table1"].tables(collected["table1"])
    (cells,) = (cells for text, cells in found.items() if text.startswith("What a method costs"))
    lines = {line[0]: line[1:] for line in cells}
    assert lines["SparseGPT"] == ["1.50", "12", "16,384"]
    for method in table1.EXTRACTED:
        assert lines[method] == ["0", "0", "0"]


def test_pruners_remarks_are_counted(collected: dict[str, dict[str, Any]]) -> None:
    notes = " ".join(EXPERIMENTS["table1"].notes(collected["table1"]))
    assert "attn SparseGPT 3/12 (1)" in notes and "Wanda 3/12" not in notes


# -- table 2


def test_table_2_meets_the_papers(collected: dict[str, dict[str, Any]]) -> None:
    rows = collected["table2"]["rows"]
    assert len(rows) == 13
    for row in rows:
        assert row["terabytes"] == pytest.approx(row["paper"]["terabytes"], abs=0.02)
        assert row["memory"] == pytest.approx(row["paper"]["memory"], abs=0.04 if row["setting"] == "DDP" else 0.02)


def test_table_2_clocks_are_relative_to_ddp(collected: dict[str, dict[str, Any]]) -> None:
    rows = {(row["setting"], row["size"]): row for row in collected["table2"]["rows"]}
    assert rows["both", "4/12"]["wall_clock"] == pytest.approx(30 / 40)
    assert rows["both", "4/12"]["paper"]["wall_clock"] == pytest.approx((3 * 3600 + 279) / (4 * 3600 + 35 * 60 + 42))
    assert rows["DDP", "12/12"]["wall_clock"] == rows["DDP", "12/12"]["paper"]["wall_clock"] == 1.0
    assert collected["table2"]["ddp_ms"] == 40.0
    _, text = EXPERIMENTS["table2"].tables(collected["table2"])
    assert text == "Wall clock, of DDP's, measured at scale micro"


# -- figures


def test_half_the_blocks_approach_half_the_memory(collected: dict[str, dict[str, Any]]) -> None:
    models = list(collected["fig2"]["models"].values())
    assert [model["params"] for model in models] == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    for way in fig2.UNDIVIDED:
        shares = [model["share"][way] for model in models]
        assert shares == sorted(shares, reverse=True) and shares[-1] > 0.5
    assert models[-1]["share"]["all layers divided"] < 0.53


def test_half_of_an_odd_number_is_what_two_workers_hold() -> None:
    """The mean of 12 and 13 of XL's 25 blocks, counted on blueprints that together hold all."""
    layout = make_layout(GPT2Config(n_layer=48, n_head=25, n_embd=1600).to_dict())
    drawn = draw_round(layout, Division("both", ((12, 12), (13, 13)), 0, 0), 0, 1)
    half = sum(layout.num_params(blueprint) for blueprint in drawn) / 2
    found = fig2._model(48, 25, 1600)["half_gib"]["all layers divided"]
    assert found == pytest.approx(16 * half / 2**30 + 0.06)


def test_stability_is_the_logarithm_of_the_right_tickets(collected: dict[str, dict[str, Any]], faked: Lab) -> None:
    for name, setting in (("fig4", "attn"), ("fig7", "both"), ("fig8", "ffn")):
        data = collected[name]
        assert data["setting"] == setting
        rows = faked.result(shared.tickets(faked, twist(data["setting"], 6), data["setting"]))["tickets"]
        perplexities = next(row["perplexities"] for row in rows if row["size"] == 4)
        assert data["losses"]["TwIST SE_6/12"]["4/12"] == [log(value) for value in perplexities]
        assert np.std(data["losses"]["DDP"]["4/12"]) > np.std(data["losses"]["TwIST SE_6/12"]["4/12"])
    assert "median of 6.8" in " ".join(EXPERIMENTS["fig7"].notes(collected["fig7"]))


def test_heatmap_has_training_across_and_evaluation_up(collected: dict[str, dict[str, Any]]) -> None:
    data = collected["fig9"]
    assert data["mean"]["10/12"]["4/12"] == mean_of("twist-both-10", 4)
    lines = only_table("fig9", data)
    assert lines["evaluated at"][1:] == [f"trained at {size}/12" for size in (4, 6, 8, 10)]
    wanted = f"{mean_of('twist-both-10', 4):.2f}"
    assert lines["4/12"][4] == wanted
    figure = fig5.draw(data)
    axes = figure.axes[0]
    (cell,) = (text for text in axes.texts if text.get_text() == wanted)
    assert cell.get_position() == (3, 0)
    assert axes.get_xticklabels()[3].get_text() == "10/12" and axes.get_yticklabels()[0].get_text() == "4/12"


def test_heatmap_is_yellow_where_perplexity_is_low(collected: dict[str, dict[str, Any]]) -> None:
    (image,) = fig5.draw(collected["fig5"]).axes[0].images
    low, high = (image.to_rgba(np.array([limit]))[0] for limit in image.get_clim())
    assert low[:3] == pytest.approx((0.993, 0.906, 0.144), abs=0.01)
    assert sum(high[:3]) < 1


def test_heatmap_has_the_cells_that_the_paper_prints(collected: dict[str, dict[str, Any]]) -> None:
    _, cells = EXPERIMENTS["fig9"].tables(collected["fig9"]).values()
    assert cells[1:] == [
        ["10/12", "-", "-", "-", "17.97"],
        ["8/12", "-", "20.02", "19.67", "-"],
        ["6/12", "-", "21.32", "-", "-"],
        ["4/12", "23.14", "25.53", "-", "60.05"],
    ]
    low, high = (mean_of("twist-both-4", size) for size in (10, 4))
    assert (
        EXPERIMENTS["fig9"]
        .notes(collected["fig9"])[-1]
        .endswith(f"21.76 to 23.14 in the paper's text, ours {low:.2f} to {high:.2f}.")
    )
    assert collected["fig5"]["paper"]["10/12"] == {} and collected["fig5"]["paper_range"] == []


def test_latency_ratios(collected: dict[str, dict[str, Any]]) -> None:
    tables = EXPERIMENTS["fig6"].tables(collected["fig6"]).values()
    ours, paper = ({line[0]: line[1:] for line in cells} for cells in tables)
    assert (ours["both 4/12"][:2], paper["both 4/12"][:2]) == (["30.00", "0.750"], ["263", "0.683"])
    assert (ours["DDP 12/12"], paper["DDP 12/12"]) == (["40.00", "1.000", "1.000"], ["385", "1.000", "1.000"])


def flops_share(layers: int, divided: int, width: int, vocab: int, window: int, attn: float, ffn: float) -> float:
    """Of GPT-2's matrix products: 4 d^2 and two products of attention, 8 d^2, and the head."""

    def step(attn: float, ffn: float) -> float:
        part = (layers - divided) * np.array([1.0, 1.0]) + divided * np.array([attn, ffn])
        weights = 4 * width**2 * part[0] + 8 * width**2 * part[1] + vocab * width
        return float(6 * weights + 12 * window * width * part[0])

    return step(attn, ffn) / step(1.0, 1.0)


def test_flops_stand_beside_the_times(collected: dict[str, dict[str, Any]]) -> None:
    data, third = collected["fig6"], 4 / 12
    for name, attn, ffn in (("ffn 4/12", 1.0, third), ("attn 4/12", third, 1.0), ("both 4/12", third, third)):
        assert data["paper_flops"][name] == pytest.approx(flops_share(12, 8, 768, 50257, 1024, attn, ffn))
        assert data["flops"][name] == pytest.approx(flops_share(3, 1, 24, 300, 16, attn, ffn))
        assert only_table("fig6", data)[name][3] == f"{data['flops'][name]:.3f}"
    left, right = fig6.draw(data).axes
    assert left.get_ylim() == right.get_ylim()
    for axes, ms, flops in ((left, data["ms"], data["flops"]), (right, data["paper"], data["paper_flops"])):
        (marks,) = axes.lines
        assert np.asarray(marks.get_ydata()).tolist() == [flops[name] for name in fig6.SHAPES]
        bars = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
        assert bars == [ms[name] / ms[FULL] for name in fig6.SHAPES]


# -- for real


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Lab:
    """Figure 4's tasks, done."""
    lab = Lab(tmp_path_factory.mktemp("micro"), MICRO, ("data.source=files", f"data.path={text_folder}"))
    for task in EXPERIMENTS["fig4"].tasks(lab):
        execute(lab, task)
    return lab


def test_figure_4_from_training_to_page(trained: Lab) -> None:
    experiment = EXPERIMENTS["fig4"]
    assert all(trained.is_done(task) for task in experiment.tasks(trained))
    data = experiment.collect(trained)
    for losses in data["losses"].values():
        assert [len(values) for values in losses.values()] == [3] * 4
        assert all(3 < value < 8 for values in losses.values() for value in values)
    (cells,) = experiment.tables(data).values()
    assert len(cells) == 9
    (draw,) = experiment.figures.values()
    with styled():
        assert_legible(draw(data))


def test_latency_measures_each_shape(trained: Lab) -> None:
    threads = torch.get_num_threads()
    arguments: dict[str, Any] = {**MEASURE.arguments, "turns": 2}
    found = MEASURES["latency"](trained.run("ddp"), **arguments)
    assert found["ms"].keys() == set(SHAPES)
    assert all(0 < value < 5000 for value in found["ms"].values())
    assert (found["batches"], found["tokens"], found["threads"]) == (2, 32, 1)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(found)) == found


def test_a_run_goes_on_from_what_another_has_trained(trained: Lab) -> None:
    task = train("after", "algorithm=ddp", "train.rounds=1", "train.lr=1e-9", after=DDP)
    execute(trained, task)
    (start,) = trained.run("ddp").checkpoints()[-1:]
    assert trained.run("after").job().config.model.pretrained == str(start)
    assert trained.result(task)["full"] == pytest.approx(trained.result(DDP)["full"], rel=1e-5)
    assert trained.is_done(task)
