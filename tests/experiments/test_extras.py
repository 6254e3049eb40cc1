"""The experiments beyond the paper: what they measure by hand, and what they show of made-up results."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import comb, exp, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legible import assert_legible

from twist_fl import rounds
from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.cost import moment_bytes, round_bytes
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.experiments import (
    ablation,
    best,
    failure,
    finetune,
    real_cost,
    recipe,
    search,
    sweep,
    theorem,
    weighing,
)
from twist_fl.experiments.experiment import Experiment
from twist_fl.experiments.extras import EXTRAS
from twist_fl.experiments.lab import SCALES, TRAIN, Lab, Task
from twist_fl.experiments.measures import MEASURES
from twist_fl.experiments.pretrained import PRETRAINED, PRETRAINED_BOTH
from twist_fl.experiments.runs import DDP
from twist_fl.model.masked import MaskedModel
from twist_fl.model.subnet import State
from twist_fl.pruning.methods import prune
from twist_fl.report.cells import MAX_COLUMNS
from twist_fl.report.plots import styled
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.results import portable_config
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import write_text
from twist_fl.tickets.evaluate import mean_nll
from twist_fl.training.job import Job, make_job

GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_head": 12, "n_layer": 5, "vocab_size": 8, "n_positions": 8}
LAYOUT = make_layout(GPT2)
DIVISION = Division("both", ((6, 6),) * 2, 1, 2)


@pytest.fixture(scope="module")
def job(tiny_job: Callable[..., Job]) -> Job:
    return tiny_job()


@pytest.fixture(scope="module")
def state(job: Job, random_state: Callable[..., State]) -> State:
    return random_state(job.layout)


@pytest.fixture(scope="module")
def folder(job: Job, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run: 5 layers, of which 1 and 2 are divided into 4 blocks."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    folder.create(job)
    done = rounds.run(job, rounds.start(job), folder.path)
    folder.save(done, job.model_config)
    return folder


def test_lost_nodes_miss_in_every_divided_layer_and_nowhere_else() -> None:
    left = failure.survivors(LAYOUT, DIVISION, [0, 7])
    alive, every = (1, 2, 3, 4, 5, 6, 8, 9, 10, 11), tuple(range(12))
    assert left.attn == left.ffn == (every, alive, alive, every, every)


def test_a_kind_that_is_not_divided_is_on_every_node() -> None:
    left = failure.survivors(LAYOUT, replace(DIVISION, setting="ffn"), [3])
    assert left.attn == full_blueprint(LAYOUT).attn
    assert 3 not in left.ffn[1]


def test_a_node_holds_neighbouring_ffn_blocks_where_there_are_more_than_heads() -> None:
    layout = make_layout(GPT2, 24)
    left = failure.survivors(layout, DIVISION, [0, 11])
    assert left.attn[1] == tuple(range(1, 11))
    assert left.ffn[1] == tuple(range(2, 22))


def test_somebody_must_be_left() -> None:
    with pytest.raises(ValueError, match="no attn block is left"):
        failure.survivors(LAYOUT, DIVISION, range(12))


@given(lost=st.integers(0, 12), draws=st.integers(1, 30), seed=st.integers(0, 5))
def test_choices_are_different_and_all_of_them_where_they_are_few(lost: int, draws: int, seed: int) -> None:
    found = failure.choices(12, lost, draws, seed)
    assert len(found) == len(set(found)) == min(draws, comb(12, lost))
    assert all(len(set(chosen)) == lost and set(chosen) <= set(range(12)) for chosen in found)
    assert found == failure.choices(12, lost, draws, seed)
    if comb(12, lost) <= draws:
        assert set(found) == set(combinations(range(12), lost))


def test_failure_is_the_masked_model(folder: RunFolder) -> None:
    """With the scale factor, and without one, of all four choices of one lost node."""
    job, found = folder.job(), failure.failure(folder, lost=[0, 1], draws=4)
    done = folder.load()
    assert done is not None
    for name, scale in (("scaled", "sqrt"), ("unscaled", "none")):
        masked = MaskedModel(job.models(scale=scale))  # type: ignore[arg-type]
        nlls = [
            mean_nll(masked.load(failure.survivors(job.layout, job.division, [node]), done.params), job.corpus.test, 4)
            for node in range(4)
        ]
        none, one = found[name]
        assert one["perplexities"] == pytest.approx([exp(nll) for nll in nlls], rel=1e-4)
        assert (one["mean"], one["max"]) == (fmean(one["perplexities"]), max(one["perplexities"]))
        assert none["perplexities"] == pytest.approx([folder_full(folder)])


def folder_full(folder: RunFolder) -> float:
    """Perplexity of the full model."""
    job, done = folder.job(), folder.load()
    assert done is not None
    return exp(mean_nll(job.models().load_sliced(full_blueprint(job.layout), done.params), job.corpus.test, 4))


def test_norm_ratio_is_that_of_the_layer_masked_by_hand(job: Job, state: State) -> None:
    """The first divided layer's input is the full model's: there the subnet's own output is the oracle."""
    windows, size = job.corpus.test[:2], 2
    ratios = theorem.norm_ratios(job, state, windows, size, draws=3)
    assert set(ratios) == {(kind, layer) for kind in KINDS for layer in (1, 2)}
    full = _block_sum(job, state, windows, full_blueprint(job.layout))
    for draw in range(3):
        ticket = draw_ticket(job.layout, job.division, (size, size), job.config.seed, draw)
        sub = _block_sum(job, state, windows, ticket)
        assert ratios["attn", 1][draw] == pytest.approx(sub / full, rel=1e-5)


def _block_sum(job: Job, state: State, windows: Any, ticket: Blueprint) -> float:
    """Mean norm of the subnet's own attention output in layer 1, less the bias."""
    model: Any = job.models(scale="none").load_sliced(ticket, state)
    outputs: list[torch.Tensor] = []
    hook = model.transformer.h[1].attn.c_proj.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    with torch.inference_mode():
        model.eval()(torch.tensor(windows, dtype=torch.int64))
    hook.remove()
    return float((outputs[0] - state["transformer.h.1.attn.c_proj.bias"]).norm(dim=-1).mean())


def test_norm_ratio_of_all_blocks_is_one_and_of_equal_blocks_is_kappa(job: Job, state: State) -> None:
    """Blocks that all do the same add up linearly: then the norm is kappa, and not its root."""
    windows, equal = job.corpus.test[:1], dict(state)
    for param in job.layout.params:
        if param.kind:
            blocks = state[param.name].clone().reshape(param.blocked(param.num_blocks))
            equal[param.name] = blocks[:, :, :1].expand_as(blocks).reshape(param.shape)
    for ratios in theorem.norm_ratios(job, state, windows, 4, draws=1).values():
        assert ratios == pytest.approx([1.0])
    for ratios in theorem.norm_ratios(job, equal, windows, 2, draws=2).values():
        assert ratios == pytest.approx([0.5, 0.5], rel=1e-5)


def test_a_fresh_layer_follows_the_square_root(job: Job) -> None:
    ratios = theorem.norm_ratios(job, job.initial_state(), job.corpus.test[:4], 1, draws=4)
    for kind in KINDS:
        mean = fmean(value for (k, _), values in ratios.items() if k == kind for value in values)
        assert mean == pytest.approx(sqrt(1 / 4), rel=0.2)


@pytest.mark.parametrize("method", ["magnitude", "se"])
def test_weights_are_counted_in_the_file(job: Job, state: State, method: str) -> None:
    """Zeros stay in the file of a full-size model; a ticket's file is smaller, and gzip gains little on it."""
    pruned = prune(job, state, method, 2, seed=0)
    size, num_full = weighing.weigh(job, pruned), job.layout.num_params()
    full = weighing.weigh(job, replace(pruned, method="full", params=state, blueprint=None))
    assert (full.num_params, full.nonzero) == (num_full, num_full)
    if method == "se":
        assert size.num_params == size.nonzero == job.layout.num_params(pruned.blueprint)
    else:
        zeros = sum(int((tensor == 0).sum()) for tensor in pruned.params.values())
        assert zeros > 0
        assert (size.num_params, size.nonzero) == (num_full, num_full - zeros)
        assert size.file_bytes == full.file_bytes
    assert 4 * size.num_params < size.file_bytes < 4 * size.num_params + 20_000
    assert size.gzip_bytes < full.gzip_bytes < full.file_bytes


def test_gzip_bytes_are_those_of_gzip(tmp_path: Path) -> None:
    file = tmp_path / "zeros"
    file.write_bytes(bytes(3_000_000))
    packed = len(gzip.compress(file.read_bytes(), compresslevel=6))
    assert weighing._gzip_bytes(file) == pytest.approx(packed, abs=40)


def test_the_model_that_is_timed_is_the_one_that_is_measured(job: Job, state: State) -> None:
    ticket = prune(job, state, "se", 2, seed=0)
    assert ticket.blueprint is not None
    model = job.models().load_sliced(ticket.blueprint, state)
    timed = weighing.dense_model(job, ticket)
    assert sum(p.numel() for p in timed.parameters()) == job.layout.num_params(ticket.blueprint)
    assert mean_nll(timed, job.corpus.test, 4) == pytest.approx(mean_nll(model, job.corpus.test, 4), rel=1e-5)


def test_real_cost_of_a_run(folder: RunFolder) -> None:
    found = weighing.real_cost(
        folder, methods=["magnitude", "se"], size=2, draws=2, calibration=4, new_tokens=2, turns=1
    )
    full, magnitude, ticket = found["rows"]
    assert full["perplexity"] == pytest.approx(folder_full(folder), rel=1e-6)
    assert full["num_params"] == magnitude["num_params"] > ticket["num_params"]
    assert all(row["ms_per_window"] > 0 and row["ms_per_token"] > 0 for row in found["rows"])
    assert (magnitude["draws"], ticket["draws"], found["of"]) == (1, 2, 4)
    with pytest.raises(ConfigError, match=r"new_tokens=16 .* data.window=16"):
        weighing.real_cost(folder, methods=[], size=2, draws=1, calibration=1, new_tokens=16, turns=1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.optimizer_state=server"],
        ["train.optimizer_state=factored", "blueprint.num_sub=[4,2,2]"],
        ["blueprint.num_sub=[4,2,1]", "blueprint.assign=shuffled"],
        ["blueprint.num_sub=[4,2,1]", "blueprint.assign=drawn", "blueprint.policy=ordered"],
        ["algorithm=fedavg"],
        ["algorithm=ddp"],
    ],
)
def test_bytes_are_those_of_the_rounds_blueprints(tiny_job: Callable[..., Job], overrides: list[str]) -> None:
    job = tiny_job(*overrides)
    drawn = [job.blueprints(round_) for round_ in range(1, job.num_rounds + 1)]
    intervals = job.num_rounds / job.rounds_per_interval
    found = ablation.interval_bytes(job)
    assert found["weights"] == pytest.approx(sum(round_bytes(job.layout, each) for each in drawn) / intervals)
    moments = sum(moment_bytes(job.moment_layouts, each) for each in drawn) / intervals
    assert found["moments"] == pytest.approx(moments)


def test_ordered_tickets_hold_the_first_blocks(folder: RunFolder) -> None:
    job, done = folder.job(), folder.load()
    assert done is not None
    every = tuple(range(4))
    rows = (every, (0, 1), (0, 1), every, every)
    model = job.models().load_sliced(Blueprint((4, 4), rows, rows), done.params)
    (ticket,) = ablation.ordered_tickets(folder, sizes=[2])["tickets"]
    assert ticket["mean"] == pytest.approx(exp(mean_nll(model, job.corpus.test, 4)), rel=1e-6)


def blocks(size: Any) -> int:
    """Of 12; the experiments name sizes by number, and by share."""
    return int(Fraction(size) * 12) if "/" in str(size) else int(size)


def made_up(task: Task, lab: Lab) -> dict[str, Any]:
    """A result such as the task gives: perplexities 100 + a number for the run + blocks that are missing."""
    given, base = task.arguments, 100.0 + len(task.runs[0] if task.runs else task.name)
    spread = {"std": 1.5, "min": base - 1, "max": base + 2}
    if task.kind == TRAIN:
        config = lab.config(task)
        tickets = [
            {"size": size, "of": 12, "mean": base + 12 - size, **spread} for size in map(blocks, config.eval.sizes)
        ]
        return {"config": portable_config(config), "rounds": config.train.rounds, "full": base, "tickets": tickets}
    if task.kind == "failure":
        rows = [{"lost": m, "mean": base * 1.3**m, "min": base * 1.2**m, "max": base * 1.5**m, "perplexities": [base]}
                for m in given["lost"]]  # fmt: skip
        return {"nodes": 12, "seed": 0, "scaled": rows, "unscaled": [row | {"mean": 2 * row["mean"]} for row in rows]}
    if task.kind == "norms":
        ratios = [{"kind": kind, "size": size, "of": 12, "mean": (size / 12) ** 0.6, "std": 0.02}
                  for kind in KINDS for size in given["sizes"]]  # fmt: skip
        return {"rows": ratios, "draws": 3, "tokens": 1000, "seed": 0}
    if task.kind in ("ordered_tickets", "start", "tickets"):
        held = map(blocks, given["sizes"])
        drawn = {"mean": 90.0, **spread, "perplexities": [90.0]}
        return {"full": 80.0, "tickets": [{"size": size, "of": 12, **drawn} for size in held]}
    if task.kind == "prune":
        return {"perplexity": 50.0 + blocks(given["size"])}
    assert task.kind == "real_cost"
    sizes = {"num_params": 1000, "file_bytes": 4000, "gzip_bytes": 3600, "ms_per_window": 8.0, "ms_per_token": 2.0}
    full = {"method": "full", "nonzero": 1000, "perplexity": base, "draws": 1, **sizes}
    zeros = {"nonzero": 400, "gzip_bytes": 1600}
    small = {"num_params": 400, "nonzero": 400, "file_bytes": 1600, "gzip_bytes": 1500, "ms_per_window": 4.0}
    made = [full | {"method": method} | (small if method in ("se", "block") else zeros) for method in given["methods"]]
    return {"rows": [full, *made], "size": 4, "of": 12, "seed": 0, "turns": 3, "window": 16, "threads": 1}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Lab:
    """The tiny scale on a small text: every run is a real job, with made-up results."""
    text = ("data.source=files", f"data.path={text_folder}", "data.vocab_size=300", "data.window=16")
    lab = Lab(tmp_path_factory.mktemp("lab"), SCALES["tiny"], text)
    for task in [task for experiment in EXTRAS for task in experiment.tasks(lab)]:
        if lab.is_done(task):
            continue
        if task.kind == TRAIN:
            folder = lab.run(task.name)
            job = make_job(lab.config(task))
            lab.begin(task)
            folder.create(job)
            if task == DDP:
                folder.save(rounds.start(job), job.model_config, job.corpus.tokenizer_folder)  # others go on from it
            write_text(json.dumps(made_up(task, lab)), folder.results_file)
            folder.log("done", round=1)
        else:
            assert task.kind in MEASURES
            of = lab.stamp(task)
            assert None not in of.values(), "a run comes before what is measured of it"
            write_text(json.dumps({"result": made_up(task, lab), "of": of}), lab.file(task))
    return lab


@pytest.mark.parametrize("experiment", EXTRAS, ids=lambda experiment: experiment.name)
def test_results_are_collected_and_shown(lab: Lab, experiment: Experiment) -> None:
    data = json.loads(json.dumps(experiment.collect(lab)))
    tables = experiment.tables(data)
    assert tables
    for text, (header, *lines) in tables.items():
        assert lines
        assert "perplexity" not in text or "lower is better" in text
        assert all(len(line) == len(header) <= MAX_COLUMNS and all(line) for line in lines)
    assert all(note.endswith(".") for note in experiment.notes(data))
    said = experiment.reading(data)
    assert "seed 0" in said.lower() and re.search(r"over (up to )?\d+ (choices|draws|random)", said)
    for draw in experiment.figures.values():
        with styled():
            figure = draw(data)
            assert_legible(figure)
        assert figure.get_figheight() <= 8


def test_failure_names_the_best_run(lab: Lab) -> None:
    """Made-up perplexities grow with the run's name: 'ddp' is the best."""
    data = failure.collect(lab)
    first = failure.notes(data)[1]
    assert first.startswith("With 3 of 12 nodes lost, DDP is best: 226.29 on average (452.58 without")
    (axes, _) = failure.draw(data).axes
    assert axes.get_yscale() == "log"


def test_norms_are_beside_both_laws(lab: Lab) -> None:
    ratio, factor, *_ = theorem.tables(theorem.collect(lab)).values()
    assert [line[3] for line in ratio[:3]] == ["6/12", "0.707", "0.660 ± 0.020"]
    assert [line[3] for line in factor[:4]] == ["6/12", "1.41", "2.00", "1.52"]


def test_speed_is_relative_to_the_full_model(lab: Lab) -> None:
    data = real_cost.collect(lab)
    stored, fast = (
        next(line[1:] for line in cells if line[0] == "DDP: random ticket") for cells in real_cost.tables(data).values()
    )
    assert (stored[1:], fast) == (["400", "400", "0.00", "0.00"], ["4.00", "2.00x", "2.00", "1.00x"])
    notes = real_cost.notes(data)
    assert "40 % of the nonzero parameters, but 100 % of the file and 100 % of the speed" in notes[2]
    assert "have 40 % of the file and 200 % of the speed" in notes[3]


def test_ablation_has_a_line_for_ordered_tickets(lab: Lab) -> None:
    data = ablation.collect(lab)
    labels = [row["label"] for row in data["rows"]]
    assert labels[labels.index("ordered") + 1] == "ordered; ordered tickets"
    assert "3/12 are best of TwIST's with 'ordered; ordered tickets': 90.00; the base has" in ablation.notes(data)[-1]


@pytest.mark.parametrize("name", SCALES)
def test_one_name_is_one_run(name: str, tmp_path: Path) -> None:
    """Experiments share runs by name; at every scale, all of them can be configured."""
    lab = Lab(
        tmp_path,
        SCALES[name],
        {"small": ("data.path=.",), "smollm2": ("data.path=.", "model.pretrained=.")}.get(name, ()),
    )
    found: dict[str, Task] = {}
    for experiment in EXTRAS:
        for task in experiment.tasks(lab):
            if found.setdefault(task.name, task) is task and task.kind == TRAIN:
                assert lab.config(task).name == task.name
            assert found[task.name] == task


def test_intervals_share_one_budget(tmp_path: Path) -> None:
    lab = Lab(tmp_path, SCALES["tiny"])
    configs = [lab.config(task) for task in sweep.swept(lab)["interval"].values()]
    assert [config.train.interval for config in configs] == list(sweep.INTERVALS)
    assert {config.train.interval * (config.train.rounds or 0) for config in configs} == {1500}
    epochs = Lab(tmp_path, SCALES["small"], ("data.path=.",))
    assert {epochs.config(task).train.rounds for task in sweep.swept(epochs)["interval"].values()} == {None}


def test_the_sweep_names_the_best_value(lab: Lab) -> None:
    """Made-up perplexities grow with the run's name: 'twist-both-6' is the best of each."""
    note = sweep.notes(sweep.collect(lab))[-2]
    assert note.endswith("best are: full model at 0 (112.00), 6/12 tickets at 0 (118.00), 3/12 tickets at 0 (121.00).")


def test_a_recipe_is_a_mean_over_seeds(lab: Lab) -> None:
    data = recipe.collect(lab)
    for rows in data["recipes"].values():
        assert [row["seed"] for row in rows] == [0, 1, 2]
    (table,) = recipe.tables(data).values()
    nested = next(line for line in table if line[0] == recipe.NESTED)
    assert nested[2:] == ["90.00 ± 0.00"] * 4
    rows = data["recipes"][recipe.PRUNED]
    fulls = [row["full"] for row in rows]
    mean = sum(fulls) / 3
    spread = (sum((full - mean) ** 2 for full in fulls) / 2) ** 0.5
    assert recipe.over_seeds(rows)[0] == pytest.approx((mean, spread))
    assert table[-1][1:] == [
        f"{mean:.2f} ± {spread:.2f}",
        "58.00 ± 0.00",
        "56.00 ± 0.00",
        "54.00 ± 0.00",
        "53.00 ± 0.00",
    ]
    other = replace(lab, overrides=(*lab.overrides, "seed=5"))
    runs = [task for task in recipe.tasks(other) if task.name.startswith("ddp") and task.kind == TRAIN]
    assert [other.config(task).seed for task in runs] == [5, 6, 7]


def test_pruned_models_stand_beside_fine_tuned_ones(lab: Lab) -> None:
    data = finetune.collect(lab)
    best, every = finetune.tables(data).values()
    pruned = [f"DDP, then {name}" for name in finetune.PRUNERS]
    assert [line[0] for line in best[1:]] == [finetune.BEFORE, *finetune.METHODS, *pruned]
    assert len(every) - 1 == sum(
        len(rates) * (1 + len(pruned) * (name == finetune.DDP)) for name, (*_, rates) in finetune.METHODS.items()
    )
    dense, sparse = best[2], best[-1]
    assert sparse[1] == dense[1]  # pruned is the model that DDP has fine-tuned
    assert "±" in dense[-1] and "±" not in sparse[-1]
    trained = [task for task in finetune.tasks(lab) if task.kind == TRAIN and task != DDP]
    assert {lab.words(task)[-3] for task in trained} == {f"model.pretrained={lab.run('ddp').path}"}
    assert {lab.config(task).train.rounds for task in trained} == {100}
    lost = replace(lab, folder=lab.folder / "elsewhere")  # to be planned before anything has been trained
    assert lost.config(trained[0]).model.pretrained == str(lost.run("ddp").path)


def test_a_search_starts_every_run_from_one_model(lab: Lab) -> None:
    (changes,) = search.tables(search.collect(lab)).values()
    assert [line[0] for line in changes[1:]] == [search.PLAIN, *search.CHANGES]
    trained = [task for task in search.tasks(lab) if task.kind == TRAIN and task != DDP]
    assert {task.runs for task in trained} == {("ddp",)}
    taught = lab.config(next(task for task in trained if task.name.endswith("-distill")))
    assert taught.train.teacher == taught.model.pretrained
    assert str(taught.train.teacher).startswith(str(lab.run("ddp").path))


def test_the_best_recipe_and_its_rivals_have_one_start_one_budget_and_seeds(lab: Lab) -> None:
    data = best.collect(lab)
    (table,) = best.tables(data).values()
    rows = {line[0]: line[1:] for line in table[1:]}
    assert {label: len(found) for label, found in data["rows"].items() if len(found) > 1} == dict.fromkeys(
        (best.TWIST, best.DDP, "DDP, then SparseGPT"), 3
    )
    assert rows["DDP, then SparseGPT"][0] == rows[best.DDP][0]  # pruned is the model that DDP has fine-tuned
    assert rows["DDP, then Wanda"][0] == f"{data['rows'][best.DDP][0]['full']:.2f}"  # of the first seed
    assert "division" in best.notes(data)[-1]
    trained = {task.name: task for task in best.tasks(lab) if task.kind == TRAIN and task != DDP}
    assert {task.runs for task in trained.values()} == {("ddp",)}
    configs = {name: lab.config(task) for name, task in trained.items()}
    assert {each.train.interval * (each.train.rounds or 0) for each in configs.values()} == {1500}
    assert configs["finetune-best-twist-seed-2"].seed == 2
    once = Lab(lab.folder, SCALES["small"], ("data.path=.",))
    assert len([task for task in best.tasks(once) if task.kind == TRAIN]) == 1 + len(best.METHODS)


def test_twist_is_one_checkpoint_and_a_rival_its_best_in_each_column() -> None:
    def row(method: str, lr: str, full: float, ticket: float) -> dict[str, Any]:
        return {"method": method, "lr": lr, "full": full, "tickets": [{"size": 3, "of": 12, "mean": ticket}]}

    rows = [row("TwIST", "1", 10, 40), row("TwIST", "2", 15, 20), row("DDP", "1", 10, 40), row("DDP", "2", 15, 20)]
    best = finetune.best({"rows": rows})
    assert best["TwIST"] == rows[1]
    assert (best["DDP"]["full"], best["DDP"]["tickets"][0]["mean"]) == (10, 20)


def test_a_pretrained_model_is_compared_with_the_best_pruned_one(lab: Lab) -> None:
    """At tiny it is the lab's DDP run; where the user names one, nothing is trained first."""
    runs = [(PRETRAINED, ("twist", "rewired", "fedavg")), (PRETRAINED_BOTH, ("both", "fedavg"))]
    for experiment, names in runs:
        trained = [task for task in experiment.tasks(lab) if task.kind == TRAIN and task != DDP]
        assert {task.name: task.runs for task in trained} == {f"pretrained-{name}": ("ddp",) for name in names}
        named = Lab(lab.folder, SCALES["smollm2"], ("data.path=.", "model.pretrained=."))
        assert [task.runs for task in experiment.tasks(named) if task.kind == TRAIN] == [()] * len(names)
        data = experiment.collect(lab)
        assert data["about"]["tokens"] == {f"pretrained-{name}": 100 * 4 * 15 * 4 * 16 for name in names}
        (table,) = experiment.tables(data).values()
        assert table[1] == ["before" if len(names) > 2 else "before, rewired", "80.00", *["90.00 ± 1.50"] * 4]
        pruned = [row for name, row in data["rows"].items() if name.startswith("FedAvg, ")]
        assert all(ticket.keys() == {"size", "of", "mean", "std"} for row in pruned for ticket in row["tickets"])
        full = 100 + len("ddp")
        said = experiment.notes(data)[-1]
        assert f"3/12: TwIST's random tickets have {(full + 9) / 53:.2f} of the perplexity" in said
        assert ("without rewiring" in said) == (len(names) > 2)


def test_what_a_run_started_from(folder: RunFolder) -> None:
    job = folder.job()
    params, windows = rounds.start(job).params, job.corpus.test[: job.config.eval.max_windows]
    found = MEASURES["start"](folder, sizes=[2], draws=2)
    whole = job.models().load_sliced(full_blueprint(job.layout), params)
    assert found["full"] == pytest.approx(exp(mean_nll(whole, windows, 4)), rel=1e-6)
    drawn = [draw_ticket(job.layout, job.division, (2, 2), job.config.seed, draw) for draw in range(2)]
    values = [exp(mean_nll(job.models().load_sliced(each, params), windows, 4)) for each in drawn]
    assert found["tickets"][0]["perplexities"] == pytest.approx(values, rel=1e-6)
