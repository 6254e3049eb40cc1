"""Post-training pruning against naive float64 oracles, written from the formulas with loops (spec, section 9)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from twist_fl.blueprint.division import Scores
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.cli import app
from twist_fl.model.saved import open_model
from twist_fl.model.subnet import State, get_state, load_state
from twist_fl.pruning import magnitude, sparsegpt, wanda, zpruner
from twist_fl.pruning.calibrate import Inputs, divided_matrices, draw_windows, layer_inputs
from twist_fl.pruning.choose import counts, lowest_of_all
from twist_fl.pruning.fisher import keep_best
from twist_fl.pruning.measure import measured
from twist_fl.pruning.methods import (
    Pruned,
    prune,
    pruned_perplexities,
    pruned_perplexity,
    save_pruned,
    sparsity,
    zeros,
)
from twist_fl.pruning.names import METHODS
from twist_fl.rounds import start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.evaluate import perplexity, ticket_distribution
from twist_fl.training.importance import block_scores
from twist_fl.training.job import Job

Array = npt.NDArray[np.float64]
MakeJob = Callable[..., Job]
UNSTRUCTURED = ("sparsegpt", "wanda", "zpruner", "magnitude")
STRUCTURED = ("block", "se", "se-unscaled")
NO_INPUTS = Inputs(torch.empty(0), 0)


def silent(text: str) -> None:
    raise AssertionError(f"said: {text}")


# The oracles. `x` is (tokens, in), `w` (out, in); both float64.


def naive_counts(share: Fraction, sizes: Sequence[int]) -> list[int]:
    found, done, seen = [], 0, 0
    for size in sizes:
        seen += size
        found.append(round(share * seen) - done)
        done += found[-1]
    return found


def naive_lowest(scores: list[tuple[float, int, int]], num: int) -> list[tuple[int, int]]:
    """The (row, column) of the `num` lowest; tuples compare by score, then row, then column."""
    return [(i, j) for _, i, j in sorted(scores)[:num]]


def naive_norm(x: Array, j: int) -> float:
    return sqrt(sum(float(token[j]) ** 2 for token in x))


def naive_magnitude(w: Array, share: Fraction) -> Array:
    out = w.copy()
    scores = [(abs(float(w[i, j])), i, j) for i in range(w.shape[0]) for j in range(w.shape[1])]
    for i, j in naive_lowest(scores, round(share * w.size)):
        out[i, j] = 0
    return out


def naive_wanda(w: Array, x: Array, share: Fraction) -> Array:
    out, (rows, columns) = w.copy(), w.shape
    norms = [naive_norm(x, j) for j in range(columns)]
    for i, num in enumerate(naive_counts(share, [columns] * rows)):
        for _, j in naive_lowest([(abs(float(w[i, j])) * norms[j], i, j) for j in range(columns)], num):
            out[i, j] = 0
    return out


def naive_importance(w: Array) -> Array:
    rows, columns = w.shape
    r, c = np.zeros_like(w), np.zeros_like(w)
    for i in range(rows):
        for j in range(columns):
            row, column = sqrt(sum(v * v for v in w[i])), sqrt(sum(v * v for v in w[:, j]))
            r[i, j] = w[i, j] / row if row else 0.0
            c[i, j] = w[i, j] / column if column else 0.0

    def z(values: Array) -> Array:
        mean = sum(values.flat) / values.size
        std = sqrt(sum((v - mean) ** 2 for v in values.flat) / max(1, values.size - 1))  # the sample's, as the authors'
        scored: Array = (values - mean) / std if std else np.zeros_like(values)
        return scored

    mean = sum(abs(v) for v in w.flat) / w.size
    p = sum(abs(v) < 0.1 * mean for v in w.flat) / w.size
    a = 0.7 * (1 - 0.3 * p)
    zr, zc = z(r), z(c)
    found: Array = a * abs(zr) ** 3 + (1 - a) * abs(zc) ** 3
    return found


def naive_zpruner(w: Array, x: Array, share: Fraction) -> Array:
    out, (rows, columns), importance = w.copy(), w.shape, naive_importance(w)
    scores = [(float(importance[i, j] * naive_norm(x, j) ** 1.5), i, j) for i in range(rows) for j in range(columns)]
    for i, j in naive_lowest(scores, round(share * w.size)):
        out[i, j] = 0
    return out


def naive_hessian(x: Array, num_windows: int) -> Array:
    h = np.zeros((x.shape[1], x.shape[1]))
    for token in x:
        h += 2 / num_windows * np.outer(token, token)
    return h


def naive_sparsegpt(w: Array, h: Array, share: Fraction, block: int, damping: float = 0.01) -> Array:
    """Dead weights of a block never more than its share, here; `test_dead_*` has the other cases."""
    w, h, (rows, columns) = w.copy(), h.copy(), w.shape
    dead = [j for j in range(columns) if h[j, j] == 0]
    for j in dead:
        h[j, j] = 1
        w[:, j] = 0
    h += damping * np.mean(np.diag(h)) * np.eye(columns)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    starts = range(0, columns, block)
    widths = [min(block, columns - s) for s in starts]
    for s, width, num in zip(starts, widths, naive_counts(share, [rows * n for n in widths]), strict=True):
        scores = [
            (-1.0 if j in dead else float(w[i, j] ** 2 / u[j, j] ** 2), i, j)
            for i in range(rows)
            for j in range(s, s + width)
        ]
        gone = naive_lowest(scores, num)
        for j in range(s, s + width):
            for i in range(rows):
                if (i, j) in gone:
                    error = w[i, j] / u[j, j]
                    for k in range(j, columns):
                        w[i, k] -= error * u[j, k]
                    w[i, j] = 0
    return w


def inputs_of(method: Any, x: Array, num_windows: int = 1) -> Inputs:
    return Inputs(method.statistic(torch.from_numpy(x)).double(), num_windows)


def pruned_by(method: Any, w: Array, x: Array, share: Fraction, num_windows: int = 1, **options: Any) -> Array:
    found = method.prune(torch.from_numpy(w.copy()), inputs_of(method, x, num_windows), share, silent, **options)
    array: Array = found.numpy()
    return array


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Array, Fraction]:
    """(w, x, share): random numbers, with equal rows, zero rows and dead inputs in some."""
    rows, columns, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 10)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    w, x = rng.normal(size=(rows, columns)), rng.normal(size=(tokens, columns))
    if draw(st.booleans()):
        w[draw(st.integers(0, rows - 1))] = w[0]
    if draw(st.booleans()):
        w[draw(st.integers(0, rows - 1))] = 0
    if draw(st.booleans()):
        x[:, draw(st.integers(0, columns - 1))] = 0
    of = draw(st.integers(1, 12))
    return w, x, 1 - Fraction(draw(st.integers(0, of)), of)


@st.composite
def tied(draw: st.DrawFn) -> tuple[Array, Array, Fraction]:
    """(w, x, share) of few small integers: most scores are equal to others, and exact."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    w, x = rng.integers(-2, 3, (rows, columns)), rng.integers(-1, 2, (3, columns))
    of = draw(st.integers(1, 12))
    return w.astype(float), x.astype(float), 1 - Fraction(draw(st.integers(0, of)), of)


# Counts


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 12), st.data())
def test_counts_add_up_and_each_is_within_one_of_its_share(sizes: list[int], of: int, data: st.DataObject) -> None:
    share = Fraction(data.draw(st.integers(0, of)), of)
    found = counts(share, sizes)
    assert found == naive_counts(share, sizes)
    assert sum(found) == round(share * sum(sizes))
    for num, size in zip(found, sizes, strict=True):
        assert 0 <= num <= size
        assert abs(num - share * size) <= 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_of_equal_scores_those_of_lower_index_go(scores: list[int], data: st.DataObject) -> None:
    num = data.draw(st.integers(0, len(scores)))
    removed = lowest_of_all(torch.tensor([scores]).double(), num)[0]
    assert removed.tolist() == [
        sum((other, k) < (score, i) for k, other in enumerate(scores)) < num for i, score in enumerate(scores)
    ]


# Each method against its oracle


@given(cases() | tied())
def test_magnitude(case: tuple[Array, Array, Fraction]) -> None:
    w, _, share = case
    found = magnitude.prune(torch.from_numpy(w), NO_INPUTS, share, silent).numpy()
    np.testing.assert_array_equal(found, naive_magnitude(w, share))


@given(cases() | tied())
def test_wanda(case: tuple[Array, Array, Fraction]) -> None:
    np.testing.assert_array_equal(pruned_by(wanda, *case), naive_wanda(*case))


@given(cases())
def test_wanda_takes_the_same_share_of_every_row(case: tuple[Array, Array, Fraction]) -> None:
    w, x, share = case
    found = pruned_by(wanda, w + (w == 0), x, share)
    for row in found:
        assert abs((row == 0).sum() - share * len(row)) <= 1


@given(cases())
def test_zpruner(case: tuple[Array, Array, Fraction]) -> None:
    np.testing.assert_array_equal(pruned_by(zpruner, *case), naive_zpruner(*case))


@given(cases())
def test_zpruner_importance_of_a_matrix_that_is_sparse_already(case: tuple[Array, Array, Fraction]) -> None:
    """The authors' z-scores have the sample's std: one factor for all, so the same weights go."""
    w = np.where(np.abs(case[0]) < 0.7, 0.05 * case[0], case[0])
    n = w.size
    factor = (n / max(1, n - 1)) ** 1.5
    expected = factor * naive_importance(w)
    np.testing.assert_allclose(zpruner.importance(torch.from_numpy(w)).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_zpruner_of_equal_weights_is_finite(value: float) -> None:
    """Every std and, for 0, every norm is 0: all importances tie at 0 and the first weights go."""
    importance = zpruner.importance(torch.full((1, 4), value, dtype=torch.float64))
    assert torch.isfinite(importance).all()
    w = torch.full((2, 3), value, dtype=torch.float64)
    w[1] = 0
    assert torch.isfinite(zpruner.importance(w)).all()
    found = pruned_by(zpruner, np.full((2, 2), 3.0), np.ones((3, 2)), Fraction(1, 2))
    assert found.tolist() == [[0, 0], [3, 3]]


@given(cases(), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=100)
def test_sparsegpt(case: tuple[Array, Array, Fraction], block: int, num_windows: int) -> None:
    w, x, share = case
    h = naive_hessian(x, num_windows)
    dead = np.diag(h) == 0
    blocks = [dead[s : s + block] for s in range(0, len(dead), block)]
    asked = naive_counts(share, [len(w) * len(part) for part in blocks])
    if any(len(w) * part.sum() > num for part, num in zip(blocks, asked, strict=True)):
        return  # more dead weights than the block's share
    found, expected = pruned_by(sparsegpt, w, x, share, num_windows, block=block), naive_sparsegpt(w, h, share, block)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def correlated(rows: int, columns: int, tokens: int = 400, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns)) / sqrt(columns)
    return rng.normal(size=(rows, columns)), x


@pytest.mark.parametrize("columns", [128, 200, 256, 300])
def test_sparsegpt_in_float32_with_its_own_block(columns: int) -> None:
    """Widths that are and are not a multiple of 128, as a run prunes: float32 weights and inputs."""
    w, x = correlated(3, columns)
    w, x = w.astype(np.float32).astype(float), x.astype(np.float32).astype(float)
    inputs = Inputs(sparsegpt.statistic(torch.from_numpy(x).float()).double(), 4)
    found = sparsegpt.prune(torch.from_numpy(w).float(), inputs, Fraction(2, 3), silent)
    expected = naive_sparsegpt(w, naive_hessian(x, 4), Fraction(2, 3), 128)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy() == 0, expected == 0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (found == 0).sum() == round(Fraction(2, 3) * 3 * columns)


def test_the_factor_is_that_of_optimal_brain_surgeon() -> None:
    """Row j of U is what OBS needs for column j once the columns to its left are fixed."""
    _, x = correlated(1, 9)
    h = naive_hessian(x, 3)
    u = sparsegpt.inverse_factor(torch.from_numpy(h), silent).numpy()
    h += 0.01 * np.mean(np.diag(h)) * np.eye(9)
    for j in range(9):
        inverse = np.linalg.inv(h[j:, j:])
        np.testing.assert_allclose(u[j, j] ** 2, inverse[0, 0], rtol=1e-10)
        np.testing.assert_allclose(u[j, j:] / u[j, j], inverse[0] / inverse[0, 0], rtol=1e-8, atol=1e-12)
        assert not u[j, :j].any()


def test_sparsegpt_breaks_ties_by_index() -> None:
    """Orthogonal inputs of one norm: all scores equal, nothing propagates."""
    found = pruned_by(sparsegpt, np.ones((2, 4)), np.eye(4), Fraction(1, 2), block=2)
    assert found.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_sparsegpt_of_a_zero_row_keeps_it_zero() -> None:
    w, x = correlated(4, 12)
    w[2] = 0
    found = pruned_by(sparsegpt, w, x, Fraction(1, 2), block=5)
    assert not found[2].any()
    assert (found == 0).sum() == 24


def reconstruction_error(w: Array, pruned: Array, x: Array) -> float:
    return float((((w - pruned) @ x.T) ** 2).sum())


def test_sparsegpt_reconstructs_better_than_those_that_update_nothing() -> None:
    w, x = correlated(20, 150)
    for share in (Fraction(1, 3), Fraction(1, 2), Fraction(3, 4)):
        error = {
            m.__name__.split(".")[-1]: reconstruction_error(w, pruned_by(m, w, x, share), x)
            for m in (wanda, zpruner, sparsegpt)
        }
        error["magnitude"] = reconstruction_error(w, naive_magnitude(w, share), x)
        assert error["sparsegpt"] < 0.95 * min(error["magnitude"], error["wanda"], error["zpruner"]), error


# Dead inputs


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)])
@given(st.sets(st.integers(0, 8)), st.integers(1, 9))
@settings(max_examples=25)
def test_dead_inputs_go_first_and_the_count_is_exact(share: Fraction, dead: set[int], block: int) -> None:
    w, x = correlated(4, 9)
    x[:, sorted(dead)] = 0
    said: list[str] = []
    inputs = inputs_of(sparsegpt, x)
    found = sparsegpt.prune(torch.from_numpy(w), inputs, share, said.append, block=block).numpy()
    total = round(share * w.size)
    assert (found == 0).sum() == total
    if 4 * len(dead) <= total:
        assert not found[:, sorted(dead)].any()
        assert not said
    else:
        assert f"{4 * len(dead)} weights have inputs that are always zero, {total} were to be removed" in said[0]
        alive = [j for j in range(9) if j not in dead]
        np.testing.assert_array_equal(found[:, alive], w[:, alive])


def test_dead_inputs_of_one_block_are_paid_for_by_the_others() -> None:
    sizes, dead = [8, 8, 8], [8, 0, 1]
    assert sparsegpt.block_counts(Fraction(1, 2), sizes, dead, silent) == [8, 2, 2]
    assert sparsegpt.block_counts(Fraction(1, 2), sizes, [4, 0, 1], silent) == [4, 4, 4]


@pytest.mark.parametrize("method", [wanda, zpruner])
def test_dead_inputs_go_first_without_a_hessian(method: Any) -> None:
    w, x = correlated(4, 9)
    x[:, [1, 7]] = 0
    found = pruned_by(method, w, x, Fraction(1, 3))
    assert not found[:, [1, 7]].any()
    assert (found == 0).sum() == 12


# A Hessian that is not positive definite


def test_more_damping_is_said_aloud() -> None:
    h, w = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), np.array([[3.0, 1.0, 2.0]])
    said: list[str] = []
    found = sparsegpt.prune(torch.from_numpy(w), Inputs(torch.from_numpy(h), 2), Fraction(1, 3), said.append)
    assert [text.rpartition("raised to ")[2] for text in said] == [
        f"{damping} of its mean diagonal" for damping in ("0.1", "1", "10")
    ]
    np.testing.assert_allclose(found.numpy(), naive_sparsegpt(w, h, Fraction(1, 3), 128, damping=10), rtol=1e-10)


def test_a_singular_hessian_needs_no_more_damping() -> None:
    """Fewer tokens than inputs."""
    w, x = correlated(4, 30, tokens=3)
    found = pruned_by(sparsegpt, w, x, Fraction(1, 2))
    np.testing.assert_allclose(
        found, naive_sparsegpt(w, naive_hessian(x, 1), Fraction(1, 2), 128), rtol=1e-8, atol=1e-10
    )


def test_a_hessian_that_no_damping_mends() -> None:
    broken = Inputs(torch.full((2, 2), float("nan"), dtype=torch.float64), 1)
    with pytest.raises(ConfigError, match="no damping makes the Hessian positive definite"):
        sparsegpt.prune(torch.ones(1, 2), broken, Fraction(1, 2), lambda text: None)


# What is pruned, and what it sees


@pytest.fixture(scope="module")
def job(tiny_job: MakeJob) -> Job:
    return tiny_job("eval.max_windows=8")


@pytest.fixture(scope="module")
def state(job: Job, random_state: Callable[..., State]) -> State:
    return random_state(job.layout)


def full_model(job: Job, state: State) -> Any:
    model = AutoModelForCausalLM.from_config(job.model_config)  # type: ignore[no-untyped-call]
    load_state(model, state)
    return model.eval()


def test_matrices_are_out_by_in_and_biases_are_none(job: Job, state: State) -> None:
    found = divided_matrices(job.layout, job.division)
    assert [matrix.name.removeprefix("transformer.h.1.") for matrix in found[:6]] == [
        *(f"attn.c_attn.weight[{section}]" for section in range(3)),
        *("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    ]
    assert {matrix.param.layer for matrix in found} == {1, 2}
    model = full_model(job, state)
    for matrix in found:
        module = model.get_submodule(matrix.module)
        weight = matrix.take(module.weight.detach())
        x = torch.randn(5, weight.shape[1])
        out = module(x) - module.bias
        part = out.chunk(matrix.param.sections, dim=1)[matrix.section]
        torch.testing.assert_close(x @ weight.T, part)
        matrix.put(torch.zeros_like(weight), module.weight.detach())
        assert not matrix.take(module.weight).any()
    assert all(not get_state(model)[matrix.param.name].any() for matrix in found)


def test_q_k_and_v_that_lie_together_in_each_head_are_three_matrices(job: Job) -> None:
    """As GPT-NeoX stores them, here along GPT-2's output dimension."""
    name = "transformer.h.1.attn.c_attn.weight"
    fused = replace(job.layout.by_name[name], sections=1, width=24)
    params = tuple(fused if param.name == name else param for param in job.layout.params)
    found = [m for m in divided_matrices(replace(job.layout, params=params), job.division) if m.param.name == name]
    assert [matrix.name for matrix in found] == [f"{name}[{part}]" for part in range(3)]
    weight = torch.randn(32, 96)
    for part, matrix in enumerate(found):
        columns = [head * 24 + part * 8 + i for head in range(4) for i in range(8)]
        assert torch.equal(matrix.take(weight), weight[:, columns].T)
        expected, written = weight.clone(), weight.clone()
        expected[:, columns] = 7
        matrix.put(torch.full((32, 32), 7.0), written)
        assert torch.equal(written, expected)


@pytest.mark.parametrize(("setting", "kinds"), [("attn", {"attn"}), ("ffn", {"ffn"}), ("both", {"attn", "ffn"})])
def test_only_the_kinds_of_the_setting_are_pruned(job: Job, setting: Any, kinds: set[str]) -> None:
    found = divided_matrices(job.layout, replace(job.division, setting=setting))
    assert {matrix.param.kind for matrix in found} == kinds


@pytest.mark.parametrize("batch_size", [3, 8])
def test_later_layers_see_pruned_inputs(job: Job, state: State, batch_size: int) -> None:
    """Against a hook on the whole model in which only the layers before are pruned."""
    windows, model = job.corpus.train[:8], job.models("cpu").load_sliced(full_blueprint(job.layout), state)
    oracle, batch = full_model(job, state), torch.tensor(np.array(job.corpus.train[:8]), dtype=torch.int64)
    weights, theirs = get_state(model), get_state(oracle)
    layers = 0
    for group, inputs in layer_inputs(
        model, divided_matrices(job.layout, job.division), windows, batch_size, sparsegpt.statistic
    ):
        for name, found in inputs.items():
            seen: list[torch.Tensor] = []
            with oracle.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0])):  # noqa: B023
                oracle(batch)
            x = seen[0].detach().flatten(0, 1).double()
            torch.testing.assert_close(found.total, x.T @ x, rtol=1e-5, atol=1e-5)
            assert found.num_windows == 8
        for matrix in group:
            for held in (weights, theirs):
                whole = held[matrix.param.name]
                every_other = matrix.take(whole).clone()
                every_other[::2] = 0
                matrix.put(every_other, whole)
        layers += 1
    assert layers == 2


def test_a_diverged_model_is_refused(job: Job, state: State) -> None:
    bad = state | {"transformer.wpe.weight": torch.full_like(state["transformer.wpe.weight"], float("nan"))}
    with pytest.raises(ConfigError, match=r"^transformer\.wpe\.weight has values that are not finite"):
        prune(job, bad, "wanda", 2, seed=0, calibration_windows=4)
    with pytest.raises(ConfigError, match=r"^transformer\.wpe\.weight has values that are not finite"):
        prune(job, bad, "block", 2, seed=0, calibration_windows=4)


def test_calibration_windows_are_different_and_drawn_by_the_seed(job: Job) -> None:
    windows = job.corpus.train
    drawn = draw_windows(windows, 20, 3)
    rows = {row.tobytes() for row in np.asarray(windows)}
    assert len({row.tobytes() for row in drawn} & rows) == 20
    assert np.array_equal(drawn, draw_windows(windows, 20, 3))
    assert not np.array_equal(drawn, draw_windows(windows, 20, 4))
    with pytest.raises(ConfigError, match=f"{len(windows) + 1} calibration windows .* has {len(windows)}, choose 1 to"):
        draw_windows(windows, len(windows) + 1, 0)


# Block Prune


def test_the_best_blocks_stay_and_of_equal_ones_the_later(job: Job) -> None:
    scores: Scores = {("attn", 1): (5.0, 1.0, 7.0, 3.0), ("ffn", 2): (2.0, 2.0, 2.0, 2.0)}
    kept = keep_best(job.layout, scores, (2, 1))
    whole = (0, 1, 2, 3)
    assert kept.attn == (whole, (0, 2), whole, whole, whole)
    assert kept.ffn == (whole, whole, (3,), whole, whole)


# Every method, end to end


def pruned(job: Job, state: State, method: str, size: int) -> Pruned:
    return prune(job, state, method, size, seed=1, calibration_windows=6, say=silent)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_exactly_and_can_be_evaluated(job: Job, state: State, method: str) -> None:
    before = {name: tensor.clone() for name, tensor in state.items()}
    found = pruned(job, state, method, 3)
    assert isfinite(pruned_perplexity(job, found, job.corpus.test[:8], 4))
    names = {matrix.param.name for matrix in divided_matrices(job.layout, job.division)}
    counted = zeros(job, found)
    assert len(counted) == 2 * (3 + 3)
    assert {(zero, num) for zero, num in counted.values()} == {(256, 1024), (1024, 4096)}
    assert sparsity(job, found) == 0.25
    assert (found.blueprint is None) == (method in UNSTRUCTURED)
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), "the checkpoint was changed"
        if name not in names or method in STRUCTURED:
            assert torch.equal(found.params[name], tensor), name
    assert found.calibration_tokens == (6 * 16 if method in ("sparsegpt", "wanda", "zpruner", "block") else 0)
    assert found.seconds > 0
    assert found.peak_bytes >= 0
    assert found.notes == []


@pytest.mark.parametrize("method", METHODS)
def test_the_full_size_leaves_the_model_untouched(job: Job, state: State, method: str) -> None:
    found = pruned(job, state, method, 4)
    assert all(torch.equal(found.params[name], tensor) for name, tensor in state.items())
    assert found.blueprint is None or found.blueprint.is_full
    assert sparsity(job, found) == 0
    expected = perplexity(full_model(job, state), job.corpus.test[:8], 4)
    assert pruned_perplexity(job, found, job.corpus.test[:8], 4) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_q_k_and_v_are_pruned_as_three_matrices(job: Job, state: State, method: str) -> None:
    """Values so small that, taken together with the rest, they would all go first."""
    small = {name: tensor.clone() for name, tensor in state.items()}
    for layer in (1, 2):
        small[f"transformer.h.{layer}.attn.c_attn.weight"][:, 64:] *= 1e-3
    counted = zeros(job, pruned(job, small, method, 2))
    for layer in (1, 2):
        for section in range(3):
            assert counted[f"transformer.h.{layer}.attn.c_attn.weight[{section}]"] == (512, 1024)


def test_a_setting_of_one_kind_leaves_the_other(tiny_job: MakeJob, state: State) -> None:
    job = tiny_job("blueprint.setting=ffn")
    for method in METHODS:
        found = pruned(job, state, method, 1)
        assert {zero / num for zero, num in zeros(job, found).values()} == {0.75}
        for name, tensor in state.items():
            if ".mlp." not in name:
                assert torch.equal(found.params[name], tensor)
        assert found.blueprint is None or set(found.blueprint.shape[0]) == {4}


def test_se_draws_the_tickets_of_a_distribution(job: Job, state: State) -> None:
    windows = job.corpus.test[:8]
    expected = ticket_distribution(
        job.models(), state, job.division, (2, 2), windows, tickets=3, seed=1, batch_size=4
    ).perplexities
    scaled, bare = (pruned(job, state, method, 2) for method in ("se", "se-unscaled"))
    assert bare.blueprint == scaled.blueprint == draw_ticket(job.layout, job.division, (2, 2), 1, 0)
    assert (bare.scale, scaled.scale) == ("none", "sqrt")
    assert pruned_perplexity(job, scaled, windows, 4) == expected[0]
    assert pruned_perplexities(job, scaled, windows, 4, draws=3, seed=1) == expected
    model = job.models(scale="none").load_sliced(bare.blueprint, state)
    assert pruned_perplexity(job, bare, windows, 4) == perplexity(model, windows, 4) != expected[0]
    assert pruned_perplexities(job, bare, windows, 4, draws=3, seed=1)[0] == perplexity(model, windows, 4)


def test_block_prune_has_no_scale_and_keeps_what_fisher_ranks_highest(job: Job, state: State) -> None:
    found = pruned(job, state, "block", 2)
    scores = block_scores(job, state, draw_windows(job.corpus.train, 6, 1))
    assert found.scale == "none"
    assert found.blueprint is not None
    for (kind, layer), score in scores.items():
        assert sorted(found.blueprint.held(kind, layer)) == sorted(np.argsort(score)[2:])


def test_sparsegpt_reconstructs_the_model_s_own_matrices_better(job: Job, state: State) -> None:
    model = job.models("cpu").load_sliced(full_blueprint(job.layout), state)
    matrices, weights = divided_matrices(job.layout, job.division), get_state(model)
    for group, inputs in layer_inputs(model, matrices, job.corpus.train[:40], 8, sparsegpt.statistic):
        for matrix in group:
            weight, h = matrix.take(weights[matrix.param.name]).double(), inputs[matrix.module].total

            def error(pruned: torch.Tensor, weight: torch.Tensor = weight, h: torch.Tensor = h) -> float:
                return float(((weight - pruned) @ h * (weight - pruned)).sum())

            half = Fraction(1, 2)
            ours = error(sparsegpt.prune(weight, inputs[matrix.module], half, silent))
            assert ours < 0.8 * error(magnitude.prune(weight, NO_INPUTS, half, silent)), matrix.name


def test_what_is_said_of_a_matrix_is_noted(job: Job, state: State) -> None:
    """A layer norm that is silent: all inputs of c_fc are zero, more weights than there are to remove."""
    said: list[str] = []
    dead = {name: tensor * (0 if name.startswith("transformer.h.1.ln_2") else 1) for name, tensor in state.items()}
    found = prune(job, dead, "sparsegpt", 3, seed=1, calibration_windows=4, say=said.append)
    assert found.notes == said
    assert said == [
        "transformer.h.1.mlp.c_fc.weight: 4096 weights have inputs that are always zero, "
        "1024 were to be removed: the others stay"
    ]
    assert zeros(job, found)["transformer.h.1.mlp.c_fc.weight"] == (1024, 4096)


@pytest.mark.parametrize(
    ("method", "size", "reason"),
    [
        ("obs", 2, r"no pruning method 'obs': choose one of sparsegpt, .*magnitude"),
        ("wanda", 5, "5 of a layer's 4 blocks is impossible: choose 1 to 4"),
        ("block", 0, "0 of a layer's 4 blocks is impossible"),
    ],
)
def test_what_cannot_be_pruned(job: Job, state: State, method: str, size: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        prune(job, state, method, size, seed=0)


def test_cost_is_measured_whatever_was_freed_before() -> None:
    ballast = bytearray(b"x" * 300_000_000)
    del ballast
    small = [bytearray(1000) for _ in range(60_000)]
    del small
    with measured("cpu") as cost:
        held = [torch.ones(1000, dtype=torch.float64) for _ in range(5000)]
        assert cost.seconds == 0
    assert len(held) == 5000
    assert 35e6 < cost.peak_bytes < 120e6
    assert cost.seconds > 0
    with measured("cpu") as nothing:
        pass
    assert nothing.peak_bytes < 5e6


# Shipping and the command


@pytest.mark.parametrize("method", ["sparsegpt", "block"])
def test_a_pruned_model_loads_by_itself(
    job: Job, state: State, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    found = pruned(job, state, method, 2)
    save_pruned(job, found, tmp_path / "model")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=method == "block")
    windows = job.corpus.test[:8]
    assert perplexity(loaded, windows, 4) == pytest.approx(pruned_perplexity(job, found, windows, 4), rel=1e-5)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    if method == "sparsegpt":
        assert type(loaded).__name__ == "GPT2LMHeadModel"
        assert (loaded.transformer.h[1].attn.c_attn.weight == 0).sum() == 3 * 512


@pytest.mark.parametrize("method", ["sparsegpt", "block"])
def test_query_heads_are_pruned_and_keys_that_they_share_are_left(
    method: str, tiny_job: MakeJob, random_state: Callable[..., State], tmp_path: Path
) -> None:
    job = tiny_job("model.architecture=llama", "model.n_kv_head=2", "blueprint.attn_blocks=heads")
    state = random_state(job.layout)
    found = pruned(job, state, method, 3)
    assert sparsity(job, found) == 0.25
    assert not [name for name in zeros(job, found) if "k_proj" in name or "v_proj" in name]
    save_pruned(job, found, tmp_path / "model")
    windows = job.corpus.test[:8]
    opened = perplexity(open_model(tmp_path / "model"), windows, 4)
    assert opened == pytest.approx(pruned_perplexity(job, found, windows, 4), rel=1e-5)


@pytest.fixture
def run_folder(job: Job, tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(job)
    folder.save(start(job), job.model_config)
    return folder


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(app.console, "width", 200)
    return lambda *words: CliRunner().invoke(app.app, ["prune", *map(str, words)])


def test_prune_command(run_folder: RunFolder, invoke: Callable[..., Any]) -> None:
    given = ("--method", "all", "--sizes", "4,2", "--windows", 4, "--calibration", 5, "--draws", 3)
    result = invoke(run_folder.path, *given)
    assert result.exit_code == 0, result.output
    results = json.loads((run_folder.path / "pruned.json").read_text())
    assert [(row["method"], row["size"]) for row in results["rows"]] == [(m, s) for m in METHODS for s in (4, 2)]
    assert results["test_tokens"] == 4 * 16
    for row in results["rows"]:
        assert row["sparsity"] == 1 - row["size"] / 4
        if row["size"] == 4:
            assert row["perplexity"] == pytest.approx(results["full"], rel=1e-6)
        ticket = row["method"].startswith("se")
        assert len(row["perplexities"]) == (3 if ticket and row["size"] == 2 else 1)
        free = ticket or row["method"] == "magnitude"
        assert row["calibration_tokens"] == (0 if free else 5 * 16)
        assert row["seconds"] < 0.05 or not ticket
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    se = next(line for line in lines if line[:2] == ["se", "2/4"])
    assert "±" in se[2]
    assert [se[3], se[4], se[6]] == ["0.5000", "0.00", "0"]
    assert "costs 0 s and 0 tokens" in result.output


def test_prune_command_writes_elsewhere(run_folder: RunFolder, invoke: Callable[..., Any], tmp_path: Path) -> None:
    given = ("--method", "magnitude,se", "--windows", 2, "--draws", 1, "--out", tmp_path / "here.json")
    result = invoke(run_folder.path, *given, "--save", tmp_path / "models")
    assert result.exit_code == 0, result.output
    assert [row["method"] for row in json.loads((tmp_path / "here.json").read_text())["rows"]] == ["magnitude", "se"]
    for name in ("magnitude-2", "se-2"):
        assert (tmp_path / "models" / name / "model.safetensors").is_file()
    assert not (run_folder.path / "pruned.json").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ("--method", "wandda"),
            r"--method 'wandda' is no pruning method, did you mean 'wanda'\?; there are sparsegpt, .*, or all",
        ),
        (("--sizes", "5"), "--sizes 5 of a layer's 4 blocks is impossible: choose 1 to 4"),
        (("--sizes", "two"), "--sizes two must be a number of blocks"),
        (("--sizes", "4"), "--sizes 4 is the whole layer, which leaves nothing to prune: give sizes below it"),
        (("--calibration", "100000"), "100000 calibration windows are asked for"),
    ],
)
def test_prune_command_refuses(
    words: tuple[str, ...], reason: str, run_folder: RunFolder, invoke: Callable[..., Any]
) -> None:
    result = invoke(run_folder.path, *words)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=reason):
        raise result.exception
    assert not (run_folder.path / "pruned.json").exists()
