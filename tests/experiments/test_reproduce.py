"""`twist-fl reproduce`: what it plans, that nothing is done twice, and what it says when something fails."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from html_page import Page, assert_one_file_for_a_phone
from legible import assert_legible
from rich.console import Console

from twist_fl import rounds
from twist_fl.cli.reproduce import fill_page, portable, reproduce
from twist_fl.config.schema import load_config
from twist_fl.experiments.catalog import EXPERIMENTS
from twist_fl.experiments.lab import SCALES, Lab, measure, train
from twist_fl.experiments.pages import write_page
from twist_fl.experiments.runner import Pool, check, execute
from twist_fl.experiments.runs import DDP
from twist_fl.report.plots import styled
from twist_fl.runs import local
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.results import refuse_other_settings
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.training.job import make_job

MICRO = [
    *("model.n_layer=3", "model.n_embd=24", "model.n_positions=16", "data.window=16", "data.vocab_size=300"),
    *("blueprint.undivided_first=1", "train.rounds=2", "train.interval=2", "train.batch_size=2"),
    *("eval.tickets=2", "eval.sizes=[6]", "eval.max_windows=8"),
]


@pytest.fixture(scope="module")
def micro(text_folder: Path) -> list[str]:
    """A run of well under a second, on text that need not be collected first."""
    return [*MICRO, "data.source=files", f"data.path={text_folder}"]


def quiet() -> Console:
    return Console(quiet=True)


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


def test_a_local_run_is_rounds_run_and_resumes_to_the_same_weights(micro: list[str], tmp_path: Path) -> None:
    config = load_config("demo", [*micro, "train.rounds=4", "checkpoint_every=2", "train.threads=1"])
    job = make_job(config)
    folder = RunFolder(tmp_path / "run")
    folder.create(job)
    job = folder.job()
    expected = rounds.run(job, rounds.start(job), tmp_path)
    folder.save(rounds.run(job, rounds.start(job), tmp_path, 2), job.model_config)
    local.train_local(folder)
    found = folder.load()
    assert found is not None
    assert all(bool((found.params[name] == value).all()) for name, value in expected.params.items())
    assert [event["round"] for event in folder.events("round")] == [3, 4]
    assert all(event["training_seconds"] > 0 for event in folder.events("round"))
    assert folder.events("done")


def test_a_local_run_whose_model_diverges_is_not_done(micro: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(make_job(load_config("demo", [*micro, "train.lr=1e30", "train.threads=1"])))
    with pytest.raises(LaunchError, match=r"^round 1: no worker's reply counted: .*0: 'training loss is nan'"):
        local.train_local(folder)
    assert not folder.events("done")
    assert not folder.checkpoints()


def test_a_lab_on_other_text_is_refused(tmp_path: Path) -> None:
    """Also when the folder's name is the same; a lab that moved with its text is not."""
    paths = [tmp_path / place / "text" for place in ("here", "moved", "other")]
    for path, word in zip(paths, ("block", "block", "layer"), strict=True):
        path.mkdir(parents=True)
        for split in ("train", "test"):
            (path / f"{split}.txt").write_text(f"The {word} of a worker. " * 300)
    folder, configs = (
        RunFolder(tmp_path / "run"),
        [load_config("demo", [*MICRO, "data.source=files", f"data.path={path}"]) for path in paths],
    )
    folder.create(make_job(configs[0]))
    for same in configs[:2]:
        refuse_other_settings(folder, same)
    with pytest.raises(ConfigError, match=rf"holds a run on other text than data\.path={paths[2]} has now"):
        refuse_other_settings(folder, configs[2])


def test_an_experiment_is_done_once_and_shown(
    micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go(dry_run: bool = False) -> None:
        console = Console(width=100)
        lab = tmp_path / "lab"
        reproduce(console, ["fig6"], "tiny", micro, folder=lab, out=tmp_path / "out", jobs=2, dry_run=dry_run)

    go(dry_run=True)
    assert "1 training runs of 2 intervals, 1 measurements; 2 tasks to do" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "lab").exists()
    go()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fig6.json", "fig6.md", "fig6.png", "report.html"}
    data = json.loads((tmp_path / "out" / "fig6.json").read_text())
    assert data["provenance"]["scale"] == "tiny"
    assert_one_file_for_a_phone(Page((tmp_path / "out" / "report.html").read_text()))
    done = files(tmp_path / "lab")
    go()
    assert files(tmp_path / "lab") == done
    with pytest.raises(ConfigError, match=r"train\.lr=0\.001, asked was 0\.5"):
        reproduce(
            quiet(), ["fig6"], "tiny", [*micro, "train.lr=0.5"], folder=tmp_path / "lab", out=None, jobs=1, dry_run=True
        )


def test_a_run_that_was_made_anew_is_measured_anew(micro: list[str], tmp_path: Path) -> None:
    lab = Lab(tmp_path, SCALES["tiny"], tuple(micro))
    run = train("one", "algorithm=ddp")
    tickets = measure("tickets", run, setting="both", sizes=[6], draws=1)
    execute(lab, run)
    execute(lab, tickets)
    assert lab.is_done(tickets)
    (lab.run("one").path / "job.json").unlink()
    lab.run("one").create(make_job(lab.config(run)))
    assert not lab.is_done(tickets)


def test_a_run_that_went_on_from_one_that_was_made_anew_is_refused(micro: list[str], tmp_path: Path) -> None:
    lab = Lab(tmp_path, SCALES["tiny"], tuple(micro))
    first = train("one", "algorithm=ddp")
    second = train("two", "algorithm=ddp", after=first)
    for task in (first, second):
        check(lab, [first, second])
        execute(lab, task)
    check(lab, [first, second])
    assert lab.is_done(second)
    shutil.rmtree(lab.run("one").path)
    for _ in range(2):  # still to be trained; and trained, with a checkpoint of the same name
        assert not lab.is_done(second)
        with pytest.raises(ConfigError, match=r"two did not start from the 'one' that is .* remove it"):
            check(lab, [first, second])
        execute(lab, first)


def test_failed_tasks_are_named_and_what_needs_them_is_left(tmp_path: Path) -> None:
    lab = Lab(tmp_path, SCALES["tiny"], (*MICRO, "data.source=files", f"data.path={tmp_path / 'nothing'}"))
    with pytest.raises(LaunchError, match=r"1 of 2 tasks failed; 1 others need them\. Their logs: .*ddp\.log"):
        Pool(quiet(), lab, [DDP, measure("latency", DDP, settings=["both"], sizes=[4], turns=1)], 2).run()


def test_what_does_not_exist_is_refused_with_what_does(tmp_path: Path) -> None:
    for names, scale, message in (
        (["table3"], "tiny", "no experiment 'table3'"),
        (["fig2"], "huge", "'huge' must be one of tiny"),
    ):
        with pytest.raises(ConfigError, match=message):
            reproduce(quiet(), names, scale, [], folder=tmp_path, out=None, jobs=1, dry_run=True)
    with pytest.raises(ConfigError, match=r"eval\.sizes=\[\] leaves nothing to compare: give at least one size"):
        reproduce(quiet(), ["fig2"], "tiny", ["eval.sizes=[]"], folder=tmp_path, dry_run=True)
    with pytest.raises(ConfigError, match=r"--scale smollm2 needs model\.pretrained=\.\.\. after the name"):
        reproduce(quiet(), ["pretrained"], "smollm2", ["data.path=."], folder=tmp_path, dry_run=True)


@pytest.mark.parametrize("scale", list(SCALES))
def test_everything_can_be_planned_at_every_scale(scale: str, tmp_path: Path) -> None:
    needs = {"small": ("data.path",), **{each.name: each.needs for each in SCALES.values() if each.needs}}
    given = [f"{key}={tmp_path}" for key in needs.get(scale, ())]
    reproduce(quiet(), ["all"], scale, given, folder=tmp_path, out=None, jobs=1, dry_run=True)
    lab = Lab(tmp_path, SCALES[scale], tuple(given))
    tasks = [task for experiment in EXPERIMENTS.values() for task in experiment.tasks(lab)]
    assert len({task.name for task in tasks}) == len({repr(task) for task in tasks})
    assert len({experiment.title for experiment in EXPERIMENTS.values()}) == len(EXPERIMENTS)


def test_what_is_repeated_is_repeated_as_often_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce(Console(width=100), ["best"], "tiny", [], folder=tmp_path, seeds=2, dry_run=True)
    trained = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " train " in line]
    runs = ["finetune-best-twist", "finetune-ddp-4e-3"]
    repeated = [name for run in runs for name in (run, f"{run}-seed-1")]
    assert trained == ["ddp", *repeated, "finetune-best-fedavg"]


def test_ctrl_c_leaves_no_process_and_the_same_command_goes_on(micro: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "twist_fl", "reproduce", "fig6", *micro, "train.rounds=20000"]
    process = subprocess.Popen([*words, "--dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    events = tmp_path / "runs" / "ddp" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (events.is_file() and '"round"' in events.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert b"The same command goes on" in output
    size = events.stat().st_size
    time.sleep(0.5)
    assert events.stat().st_size == size


ROOT = Path(__file__).resolve().parents[2]
PAGES = {"tiny": "results.md", "small": "results-small.md", "smollm2": "results-smollm2.md"}
PUBLISHED = [
    (scale, name) for scale in PAGES for name in EXPERIMENTS if (ROOT / "results" / scale / f"{name}.json").is_file()
]


@pytest.mark.parametrize("scale", PAGES)
def test_the_page_of_results_is_the_published_one(scale: str) -> None:
    page = ROOT / "docs" / PAGES[scale]
    made = page.with_name(f".{page.name}")
    made.write_text(page.read_text())
    try:
        fill_page(made, ROOT / "results" / scale)
        assert made.read_text() == page.read_text()
    finally:
        made.unlink()


@pytest.mark.parametrize(("scale", "name"), [each for each in PUBLISHED if EXPERIMENTS[each[1]].figures])
def test_published_figures_are_legible(scale: str, name: str) -> None:
    data = json.loads((ROOT / "results" / scale / f"{name}.json").read_text())
    for draw in EXPERIMENTS[name].figures.values():
        with styled():
            assert_legible(draw(data))


def test_the_published_page_is_one_file_for_a_phone(tmp_path: Path) -> None:
    """Its contents lead to every experiment."""
    names = [name for scale, name in PUBLISHED if scale == "tiny"]
    for name in names:
        (tmp_path / f"{name}.json").write_text((ROOT / "results" / "tiny" / f"{name}.json").read_text())
    page = Page(write_page(tmp_path).read_text())
    assert_one_file_for_a_phone(page)
    assert page.values("a", "href") == [f"#{name}" for name in names] == [f"#{id_}" for id_ in page.values("h2", "id")]


@pytest.mark.parametrize("file", sorted((ROOT / "results").rglob("*.json")), ids=lambda file: file.name)
def test_results_name_no_place_of_the_machine_that_made_them(file: Path) -> None:
    assert not re.search(r'["=]/\w+/', file.read_text())


def test_a_word_names_the_last_part_of_a_path_of_this_machine() -> None:
    assert portable("model.pretrained=/a/b/m.gguf") == "model.pretrained=m.gguf"
    assert portable("model.pretrained=org/m") == "model.pretrained=org/m"
