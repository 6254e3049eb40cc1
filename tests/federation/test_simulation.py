"""What a simulation's log says about its end."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from twist_fl.federation.apps import mistakes_in_words
from twist_fl.federation.simulation import Simulation, why_it_ended
from twist_fl.system.errors import ConfigError

BEGIN = "twist_fl: a simulation begins\n"
CLIENT = """\x1b[91mERROR \x1b[0m:     Traceback (most recent call last):
  File "client.py", line 1
ray.exceptions.RayTaskError(ClientAppException): a client's own
"""
CHAIN = """\x1b[91mERROR \x1b[0m:     An exception occurred !! Simulation Runtime crashed.
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
Traceback (most recent call last):
  File "raylet.py", line 1
ConnectionError: Failed to connect to Ray at 192.0.2.1:6379

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
RuntimeError: Simulation Runtime crashed.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
RuntimeError: An error was encountered. Ending simulation.
"""
FIRST = "ConnectionError: Failed to connect to Ray at 192.0.2.1:6379"
DIED = "twist_fl: the simulation is over: Flower's SuperLink (process 7) has ended\n"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (BEGIN + CLIENT + CHAIN, FIRST),
        (BEGIN + CHAIN + DIED, FIRST),
        (BEGIN + CHAIN + BEGIN + CLIENT + DIED, "Flower's SuperLink (process 7) has ended"),
    ],
)
def test_the_first_error_of_the_chain_or_what_died(log: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "flower.log"
    file.write_text(log)
    assert why_it_ended(file) == reason


def test_a_mistake_is_one_line_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For who watches `flwr run --stream`, and for the command that reads Flower's log."""
    log, flower = tmp_path / "flower.log", logging.getLogger("flwr")
    log.write_text(BEGIN)
    handler = logging.FileHandler(log)
    flower.addHandler(handler)
    try:
        with pytest.raises(ConfigError) as caught, mistakes_in_words():
            raise ConfigError("unknown key 'lr'")
        flower.error("Simulation raised an exception", exc_info=caught.value)  # as Flower does
    finally:
        flower.removeHandler(handler)
        flower.filters.clear()
        handler.close()
    assert capsys.readouterr().out == "twist_fl: error: unknown key 'lr'\n"
    assert "Traceback" not in log.read_text()
    assert why_it_ended(log) == "twist_fl.system.errors.ConfigError: unknown key 'lr'"


def test_a_simulation_is_over_when_a_part_of_it_is(tmp_path: Path) -> None:
    """A SuperLink whose child calls itself raylet."""
    raylet = tmp_path / "raylet"
    raylet.write_text("import time; time.sleep(999)")
    code = f"import subprocess, sys; subprocess.run([sys.executable, {str(raylet)!r}])"
    log = tmp_path / "flower.log"
    link = subprocess.Popen([sys.executable, "-c", code])
    run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
    try:
        simulation = Simulation(link, run, log, tmp_path / "begin")
        while "Ray's raylet" not in simulation.parts:
            assert simulation.poll() is None
        simulation.parts["Ray's raylet"].kill()
        simulation.wait(60)
    finally:
        for process in (link, run):
            process.kill()
            process.wait()
    assert "Ray's raylet (process " in why_it_ended(log) or "SuperLink (process " in why_it_ended(log)
