"""Each example runs, in a folder of its own, and says what it is to say; the public names are what they are to be."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import twist_fl
from twist_fl import TrainedRun
from twist_fl.federation.simulation import CONNECTION, free_port, start, wait_until_healthy, write_connection
from twist_fl.system.children import flower_home, ray_folder
from twist_fl.system.cores import usable_cores
from twist_fl.system.environment import private_environment

EXAMPLES = Path(twist_fl.__file__).parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    """What the script prints: run here, because a process of its own takes seconds to load torch."""
    said = StringIO()
    with chdir(folder), redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{name}.py"])
        patch.setattr("os.sched_getaffinity", lambda process: {0})  # beside other tests
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return said.getvalue()


def test_a_configuration(tmp_path: Path) -> None:
    """As a script: the others are started likewise."""
    command, environment = [sys.executable, str(EXAMPLES / "load_a_config.py")], {"PYTHONPATH": str(EXAMPLES.parent)}
    said = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout
    assert "presets: demo finetune gpt2-wikitext103 wikitext2" in said
    assert "refused: unknown key 'train.learning_rate', did you mean 'train.lr'?" in said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example's run."""
    folder = tmp_path_factory.mktemp("examples")
    run("train", folder)
    return folder


def test_train_uses_a_finished_run(place: Path) -> None:
    said = run("train", place)
    assert "is finished: 4 rounds" in said
    assert re.search(r"runs/example: 4 rounds, perplexity of the full model \d+\.\d\d\n", said)


def test_tickets(place: Path) -> None:
    said = run("tickets", place)
    trained = TrainedRun(place / "runs" / "example")
    for size in (8, 4):
        values = [round(value, 1) for value in trained.tickets(size, draws=3).perplexities]
        assert f"perplexities {values}" in said
    assert str(trained.blueprint(size=4).attn) in said
    assert (place / "phone" / "model.safetensors").is_file()


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    said = run("own_loop", tmp_path)
    losses = [[float(loss) for loss in found.split(",")] for found in re.findall(r"losses \[(.*)\]", said)]
    assert len(losses) == 5
    assert max(losses[-1]) < 0.01 < min(losses[0])
    ticket = re.search(r"a ticket of 2 of 6 blocks: loss ([\d.]+)", said)
    assert ticket
    assert float(ticket[1]) < 0.05


def test_a_flower_app_of_ones_own(tmp_path: Path) -> None:
    """By `flwr run`, in a simulation on this machine."""
    with flower_home(tmp_path) as home:
        address = f"127.0.0.1:{free_port()}"
        write_connection(home, address)
        environment, log = private_environment(home) | {"RAY_TMPDIR": str(ray_folder(home))}, tmp_path / "log"
        host, port = address.split(":")
        superlink = start(
            ["flower-superlink", "--insecure", "--simulation", "--host", host, "--port", port], environment, log
        )
        wait_until_healthy(address, superlink, log)
        command = ["flwr", "run", str(EXAMPLES / "flower_app"), CONNECTION, "--stream"]
        command += ["--run-config", f'folder="{tmp_path / "run"}"']
        command += ["--federation-config", f"num-supernodes=2 client-resources-num-cpus={usable_cores()}"]
        said = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=True,
        ).stdout
    superlink.wait()
    trained = TrainedRun(tmp_path / "run")
    assert trained.state.round == 2
    for event in trained.folder.events("round"):
        assert re.search(rf"my app: round {event['round']}: {{'loss': {event['loss']}", said), said
    assert f"my app: a ticket of 3 of 12 blocks: {trained.perplexity(trained.blueprint(size=3)):.1f}" in said


# The public names


def test_the_public_names_are_loaded_when_they_are_asked_for() -> None:
    code = "import sys, twist_fl\nassert not {'torch', 'flwr', 'omegaconf', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_public_name_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(twist_fl.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("twist_fl.")
        for alias in node.names
    }
    assert sorted(["__version__", *typed]) == dir(twist_fl)
    for name, module in typed.items():
        assert getattr(twist_fl, name) is getattr(sys.modules[module], name)
        assert getattr(twist_fl, name).__doc__, name


def test_a_name_that_is_not_public() -> None:
    with pytest.raises(AttributeError, match="module 'twist_fl' has no attribute 'no_such_name'"):
        twist_fl.no_such_name  # noqa: B018
