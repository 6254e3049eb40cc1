"""Distillation: the loss against torch's, targets against a full divergence, and the same bits anywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_text
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid, assert_same_run

from twist_fl.config.schema import from_yaml, load_config, to_yaml
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.saved import open_model
from twist_fl.model.subnet import load_state
from twist_fl.rounds import run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.resume import go_on
from twist_fl.system.errors import ConfigError
from twist_fl.training import teacher as module
from twist_fl.training.fitting import check_teacher
from twist_fl.training.interval import next_token_loss
from twist_fl.training.job import Job
from twist_fl.training.loss import SoftTargets, linear_cross_entropy
from twist_fl.training.teacher import Teacher, open_teacher

MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def folder(tiny_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another seed; its one checkpoint is the teacher."""
    job, kept = tiny_job("seed=5"), RunFolder(tmp_path_factory.mktemp("teacher") / "run")
    kept.create(job)
    kept.save(replace(start(job), round=1), job.model_config, job.corpus.tokenizer_folder)
    return kept.path


def taught(teacher: Path | str, share: float = 0.5) -> tuple[str, ...]:
    return f"train.teacher={teacher}", f"train.distill={share}"


def teacher_of(job: Job) -> Teacher:
    model = open_teacher(job.config, job.teacher, "cpu")
    return Teacher(model, job.config.train.distill, job.layout.sizes["vocab"], job.windows(0))


@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 1))
def test_the_gradient_is_that_of_a_mixed_target_and_the_value_that_of_the_text(
    num: int, chunk: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(num)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64).requires_grad_() for n in (num, 11))
    targets = torch.randint(11, (num,), generator=generator)
    expected = torch.rand(num, 3, generator=generator, dtype=torch.float64)
    likely = torch.stack([torch.randperm(11, generator=generator)[:3] for _ in range(num)])
    shares = torch.cat(
        [torch.full((num, 1), 1 - share, dtype=torch.float64), share * expected / expected.sum(1, keepdim=True)], 1
    )
    soft = SoftTargets(torch.cat([targets[:, None], likely], 1), shares)
    whole = torch.zeros(num, 11, dtype=torch.float64).scatter_add(1, soft.tokens, soft.shares)
    ours = linear_cross_entropy(hidden, weight, targets, chunk, soft)
    found = torch.autograd.grad(3 * ours, [hidden, weight])
    wanted = torch.autograd.grad(3 * F.cross_entropy(hidden @ weight.T, whole, reduction="sum"), [hidden, weight])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.detach(), F.cross_entropy(hidden @ weight.T, targets, reduction="sum").detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_models_loss_does_not_depend_on_the_chunk(reduction: str, folder: Path, tiny_job: MakeJob) -> None:
    job = tiny_job(*taught(folder))
    soft = teacher_of(job).targets(np.array([3, 0, 7]))
    windows = torch.tensor(job.windows(0)[[3, 0, 7]], dtype=torch.int64)
    model = job.models().load_sliced(job.blueprints(1)[0], job.initial_state())
    found = []
    for chunk in (7, 1000):
        loss = next_token_loss(model, windows, reduction, chunk, soft)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        hard = next_token_loss(model, windows, reduction, chunk).detach()
        assert torch.equal(loss.detach(), hard)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_all_tokens_of_a_teacher_give_the_divergence_from_it(
    folder: Path, tiny_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOP", 300)
    job = tiny_job(*taught(folder, 1))
    soft = teacher_of(job).targets(np.array([2, 5]))
    windows = torch.tensor(job.windows(0)[[2, 5]], dtype=torch.int64)
    with torch.inference_mode():
        expected = open_model(RunFolder(folder).checkpoints()[-1])(windows).logits[:, :-1].flatten(0, 1).softmax(1)
    student = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    ours = soft.loss(student) + (expected * expected.log()).sum()
    torch.testing.assert_close(ours, F.kl_div(student, expected, reduction="sum"), rtol=1e-3, atol=0)


def test_a_teacher_is_asked_once_a_window_and_by_itself(
    folder: Path, tiny_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(*taught(folder))
    asked: list[int] = []
    ask = Teacher._ask

    def counted(self: Teacher, window: int) -> None:
        asked.append(int(window))
        ask(self, window)

    monkeypatch.setattr(Teacher, "_ask", counted)
    teacher = teacher_of(job)
    first = teacher.targets(np.array([4, 1]))
    again = teacher.targets(np.array([1, 9, 4]))
    assert asked == [4, 1, 9]
    assert torch.equal(again.shares.view(3, 15, -1)[[2, 0]], first.shares.view(2, 15, -1))
    torch.testing.assert_close(again.shares.sum(1), torch.ones(45))


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.rounds=3",),
        ("train.variant=masked",),
        ("algorithm=ddp",),
        ("algorithm=fedavg", "train.optimizer_state=server", "train.loss_chunk=8"),
    ],
)
def test_the_app_is_rounds_run_and_the_teacher_makes_a_difference(
    overrides: tuple[str, ...], folder: Path, tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job("flower.wait_for_nodes=0.05", "eval.every=0", *taught(folder), *overrides)
    kept = RunFolder(tmp_path / "run")
    kept.create(job)
    ours = TwistStrategy(job, kept).run(LocalGrid())
    assert_same_run(ours, run(job, start(job), tmp_path / "oracle"))
    plain = tiny_job("eval.every=0", *overrides)
    without = run(plain, start(plain), tmp_path / "without")
    assert not all(torch.equal(value, without.params[name]) for name, value in ours.params.items())


def test_a_student_ends_nearer_to_its_teacher(folder: Path, tiny_job: MakeJob, tmp_path: Path) -> None:
    common = ("train.rounds=10", "eval.every=0", "train.lr=3e-3", "algorithm=fedavg")
    teacher = open_model(RunFolder(folder).checkpoints()[-1])
    found = list[float]()
    for more in ((), taught(folder, 1)):
        job = tiny_job(*common, *more)
        model = job.models().warm(job.blueprints(1)[0])
        load_state(model, run(job, start(job), tmp_path / f"run{len(found)}").params)
        windows = torch.tensor(job.corpus.test[:20], dtype=torch.int64)
        with torch.inference_mode():
            student, expected = (each.eval()(windows).logits.log_softmax(-1) for each in (model, teacher))
        found.append(float(F.kl_div(student, expected, reduction="batchmean", log_target=True)))
    assert found[1] < 0.5 * found[0]


REFUSED = {
    "train.teacher=nowhere/at/all": "train.teacher='nowhere/at/all' does not exist",
    "train.distill=-0.1": "train.distill=-0.1 must be in [0, 1]",
    "train.distill=1.5": "train.distill=1.5 must be in [0, 1]",
    "train.distill=0.7": "train.distill=0.7 has nobody to learn from: give train.teacher=FOLDER, or start",
}


def test_the_teacher_is_whom_one_starts_from_unless_another_is_named(folder: Path) -> None:
    checkpoint = str(RunFolder(folder).checkpoints()[-1])
    start_from = (f"model.pretrained={folder}", "train.distill=0.5")
    assert load_config(overrides=start_from, strict=True).train.teacher == checkpoint
    named = load_config(overrides=(*start_from, "train.teacher=elsewhere"))
    assert named.train.teacher == "elsewhere"
    assert load_config(overrides=start_from[:1]).train.teacher is None


@pytest.mark.parametrize("start_from", [(), ("model.pretrained",)])
def test_a_run_from_when_a_share_was_written_without_a_teacher_has_none(
    start_from: tuple[str, ...], folder: Path
) -> None:
    config = load_config(overrides=[f"{key}={folder}" for key in start_from])
    stored = to_yaml(replace(config, train=replace(config.train, distill=0.5)))
    assert from_yaml(stored) == config


def test_a_stored_teacher_is_asked_again(folder: Path) -> None:
    config = load_config(overrides=[f"model.pretrained={folder}", "train.distill=0.5"])
    assert from_yaml(to_yaml(config)) == config


def test_a_teacher_who_is_not_asked_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.distill=0 never asks it, train\.distill=0\.5 would"):
        load_config(overrides=[f"train.teacher={folder}"], strict=True)


@pytest.mark.parametrize("word", REFUSED)
def test_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[word])):
        load_config(overrides=[word], strict=True)


def test_a_teacher_of_other_tokens_or_of_short_texts_is_refused(
    folder: Path, tiny_job: MakeJob, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has a vocabulary of 300 tokens, and the model one of 280: give a teacher"):
        tiny_job(*taught(folder), "data.vocab_size=280")
    with pytest.raises(ConfigError, match=r"has a context of 32 tokens: use data\.window=32"):
        tiny_job(*taught(folder), "data.window=40", "model.n_positions=64")
    job = tiny_job(*taught(folder))
    check_teacher(job.config, job.layout, job.corpus.tokenizer_folder)
    gone = replace(job, config=load_config(base=job.config, overrides=[f"train.teacher={tmp_path / 'gone'}"]))
    with pytest.raises(ConfigError, match=r"gone' is not on this machine: copy it to the same place"):
        teacher_of(gone)


def test_a_teacher_of_another_tokenizer_is_refused(folder: Path, tiny_job: MakeJob, tmp_path: Path) -> None:
    """Of as many tokens: two are exchanged."""
    shutil.copytree(RunFolder(folder).checkpoints()[-1], other := tmp_path / "other")
    file = other / "tokenizer.json"
    fields = json.loads(file.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"has another tokenizer than the text \(token 'a': \d+, here \d+\): give a"):
        tiny_job(*taught(other))


@pytest.mark.parametrize("name", ["org-name", ""])
def test_a_teacher_without_a_model_is_refused(name: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no folder of a model: give one with its config\.json and weights"):
        tiny_job(*taught(name or tmp_path))


def test_workers_with_texts_of_their_own_share_the_teacher(
    folder: Path, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = RunFolder(folder).checkpoints()[-1]
    for place in range(3):
        (tmp_path / f"{place}").mkdir()
        write_text(tmp_path / f"{place}" / "a.txt", 400, seed=20 + place)
    opened: list[Path] = []

    def counted(path: Path) -> Any:
        opened.append(path)
        return open_model(path)

    monkeypatch.setattr(module, "open_model", counted)
    job = tiny_job(f"data.private={tmp_path}", f"data.tokenizer={tokenizer}", *taught(folder), "eval.every=0")
    run(job, start(job), tmp_path.parent / "moments")
    assert opened == [tokenizer]


def test_a_run_goes_on_with_the_teacher_it_began_with_wherever_that_is(
    folder: Path, tiny_job: MakeJob, tmp_path: Path
) -> None:
    place, moved, kept = tmp_path / "teacher", tmp_path / "moved", RunFolder(tmp_path / "run")
    shutil.copytree(max((folder / "checkpoints").iterdir()), place)
    kept.create(tiny_job(*taught(place)))
    place.rename(moved)
    with pytest.raises(ConfigError, match=r"^train\.teacher='.*/teacher' is not on this machine"):
        go_on(kept)
    assert go_on(kept, [f"train.teacher={moved}"]).job.config.train.teacher == str(moved)
    model = open_model(moved)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(moved)
    with pytest.raises(ConfigError, match=r"^train\.teacher='.*/moved' has other weights than when the run began"):
        go_on(kept)
