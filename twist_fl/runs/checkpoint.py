"""A run's folder: what it is (`job.json`), what happened (`events.jsonl`), and checkpoints to resume from exactly.

A checkpoint is a folder that is renamed into place when it is whole; the two newest are kept. Each is also the full
model with its tokenizer as Hugging Face keeps them, for AutoModelForCausalLM.from_pretrained or another run's
model.pretrained. Only what reads or writes one loads torch: a report or a mistake does not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from math import isfinite
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from twist_fl.config.finding import checkpoints_of, no_run
from twist_fl.config.hub import expanded
from twist_fl.data.tokenizer import copy_tokenizer
from twist_fl.runs.events import EventLog
from twist_fl.system.errors import ConfigError, DamagedError
from twist_fl.system.files import check_seal, new_folder, remove_unfinished, save_tensors, write_text
from twist_fl.system.locks import holder, locked

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from twist_fl.blueprint.architectures import Kind
    from twist_fl.model.subnet import State
    from twist_fl.rounds import RunState
    from twist_fl.training.job import Job

_KEPT = 2
_STATE = "state.json"


class DivergedError(RuntimeError):
    """A run's state is not finite: it is not saved."""


class RunFolder:
    """The folder of a run, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = expanded(path).resolve()
        self.event_log = EventLog(self.events_file)

    @property
    def job_file(self) -> Path:
        return self.path / "job.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    @contextmanager
    def lock(self, who: str) -> Iterator[None]:
        """Only one `who` (command or server) at a time works in this folder; the lock dies with its process."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f".{who}.lock"
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(file))
            except BlockingIOError as error:
                raise ConfigError(
                    f"another {who}{holder(file)} is at work in {self.path}: wait for it, or stop it"
                ) from error
            yield

    def tidy(self) -> None:
        """Remove what a server that was killed had half written, if none is at work."""
        with suppress(ConfigError), self.lock("server"):
            for folder in (self.path, self.path / "checkpoints"):
                remove_unfinished(folder)

    def create(self, job: Job) -> None:
        """Start a new run here. Raises ConfigError if the folder already holds one."""
        self.refuse_second_run()
        write_text(job.to_json(), self.job_file)

    def refuse_second_run(self) -> None:
        """Raises ConfigError if the folder already holds a run."""
        if self.job_file.exists():
            raise ConfigError(
                f"{self.path} already holds a run: resume it with `{self.resume_words}` "
                f'(or run-dir="{self.path}" under `flwr run`), or choose another folder with dir=...'
            )

    def check_run(self) -> None:
        """Raises ConfigError if there is no run here."""
        if not self.job_file.is_file():
            raise no_run(self.path)

    def job(self) -> Job:
        """The run's job. Raises ConfigError if there is no run here."""
        self.check_run()
        from twist_fl.training.job import job_from_json

        try:
            return job_from_json(self.job_file.read_text(encoding="utf-8"))
        except ConfigError:
            raise
        except ValueError as error:
            raise DamagedError(f"{self.job_file} is damaged: {error}. Restore it from a copy of the run") from error

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to the run's log, with its time."""
        self.event_log.write(event, **fields)

    def rewind(self, round_: int, event: str, **fields: Any) -> None:
        """Forget what the log says after `round_`, and append one line: `EventLog.rewind`."""
        self.event_log.rewind(round_, event, **fields)

    @contextmanager
    def failures_logged(self) -> Iterator[None]:
        """What ends a run early stands in its own log too, for the command that waits for it."""
        try:
            yield
        except Exception as error:
            self.log("failed", error=f"{type(error).__name__}: {error}")
            raise

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """Events in order; lines cut off by a crash are left out."""
        return self.event_log.events(event)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return list(checkpoints_of(self.path).values())

    @property
    def saved_round(self) -> int:
        """The round of the newest checkpoint; 0 if there is none."""
        return max(self.saved_rounds, default=0)

    @property
    def saved_rounds(self) -> list[int]:
        """Those of all whole checkpoints."""
        return list(checkpoints_of(self.path))

    @property
    def resume_words(self) -> str:
        """What to type to go on, as a shell takes it."""
        return f"twist-fl train --resume {quote(str(self.path))}"

    @property
    def way_on(self) -> str:
        """From which round a run that has ended early goes on, and what to type."""
        round_ = self.saved_round
        saved = f"round {round_} is saved; go on after it" if round_ else "nothing is saved; begin again"
        return f"{saved} with: {self.resume_words}"

    def finished(self, num_rounds: int) -> bool:
        """Whether the run came to the end of its rounds: one that goes on, longer, has results of its first ones."""
        return self.results_file.is_file() and any(each["round"] == num_rounds for each in self.events("done"))

    @property
    def moments_folder(self) -> Path:
        """What a finished run's clients on this machine kept of their optimisers, for a longer run."""
        return self.path / "moments"

    def remove(self, checkpoint: Path) -> None:
        """Never leaves half of it."""
        going = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}")  # as `files.remove_unfinished` knows them
        checkpoint.rename(going)
        shutil.rmtree(going)

    def save(self, state: RunState, model: PreTrainedConfig, tokenizer_folder: Path | None = None) -> None:
        """Raises DivergedError if the state has numbers that are not finite."""
        self._check_finite(state)
        folder = self.path / "checkpoints" / f"round-{state.round:06d}"
        fields = {
            "round": state.round,
            "cursors": state.cursors,
            "debt": sorted(state.debt),
            "moment_step": state.moments.step if state.moments else None,
            "scores": [[*place, *scores] for place, scores in state.scores.items()] if state.scores else None,
        }
        import torch

        with new_folder(folder, sealed=True) as making:
            save_tensors(state.params, making / "model.safetensors")
            if state.moments:
                save_tensors(_prefixed(state.moments.values), making / "moments.safetensors")
            if state.outer:
                rounds = {name: torch.from_numpy(counts) for name, counts in state.outer.rounds.items()}
                save_tensors(_prefixed(state.outer.values | {"rounds": rounds}), making / "outer.safetensors")
            write_text(json.dumps(fields), making / _STATE)
            # Of the dtype of what is saved: a model that came in 16 bits would be read so again.
            write_text(json.dumps(model.to_dict() | {"dtype": "float32"}, indent=1), making / "config.json")
            if tokenizer_folder:
                copy_tokenizer(tokenizer_folder, making)
        for old in self.checkpoints()[:-_KEPT]:
            self.remove(old)

    def _check_finite(self, state: RunState) -> None:
        from twist_fl.system.threads import ranges

        moments = _prefixed(state.moments.values) if state.moments else {}
        outer = _prefixed(state.outer.values) if state.outer else {}
        for name, extremes in chain(*(ranges(values).items() for values in (state.params, moments, outer))):
            if not all(map(isfinite, extremes)):
                raise DivergedError(
                    f"training has diverged: {name} has values that are not finite after round {state.round}, which is "
                    f"not saved. {self._smaller_steps()}"
                )

    def _smaller_steps(self) -> str:
        """What to do about a run that has diverged: to go on is to end in the same way."""
        if not self.saved_round:
            return "Nothing is saved: begin another run with smaller steps (train.lr, aggregate.server_lr)"
        other = f"twist-fl train model.pretrained={quote(str(self.path))} train.lr=..."
        return (
            f"Round {self.saved_round} is saved. Begin another run there with smaller steps: {other} (to go on after "
            f"it, and to the same end: {self.resume_words})"
        )

    def newest(self) -> Path | None:
        """The newest checkpoint, or None if there is none yet.

        Raises DamagedError if a byte of it is not as it was written, and says which one before it is whole.
        """
        damaged: dict[Path, DamagedError] = {}
        for round_, folder in reversed(checkpoints_of(self.path).items()):
            try:
                _check(folder, round_)
            except DamagedError as error:
                damaged[folder] = error
                continue
            if damaged:
                raise self._damage(damaged, f"The checkpoint of round {round_} is whole. To go on after it")
            return folder
        if damaged:
            raise self._damage(damaged, "No other is whole. To begin again with round 1")
        return None

    def _damage(self, damaged: Mapping[Path, DamagedError], what: str) -> DamagedError:
        remove = " ".join(quote(str(folder)) for folder in damaged)
        return DamagedError(f"{next(iter(damaged.values()))}. {what}: rm -r {remove} && {self.resume_words}")

    def load(self) -> RunState | None:
        """The state of the newest checkpoint, or None if there is none yet. Raises DamagedError, see `newest`."""
        folder = self.newest()
        if folder is None:
            return None
        from twist_fl.rounds import RunState
        from twist_fl.training.interval import Moments
        from twist_fl.training.outer_optimizer import OuterState

        fields = json.loads((folder / _STATE).read_text())
        debt: set[tuple[Kind, int, int]] = {(kind, layer, block) for kind, layer, block in fields["debt"]}
        moments = None
        if fields["moment_step"] is not None:
            moments = Moments(fields["moment_step"], _unprefixed(_load(folder / "moments.safetensors")))
        outer = None
        if (folder / "outer.safetensors").is_file():
            values = _unprefixed(_load(folder / "outer.safetensors"))
            outer = OuterState(values, {name: counts.numpy() for name, counts in values.pop("rounds").items()})
        params = _load(folder / "model.safetensors")
        scores = None
        if fields.get("scores"):
            scores = {(kind, layer): tuple(values) for kind, layer, *values in fields["scores"]}
        return RunState(params, fields["cursors"], fields["round"], frozenset(debt), moments, outer, scores)


def _check(folder: Path, round_: int) -> None:
    """Raises DamagedError unless the checkpoint is as it was written, and of the round that it is called by."""
    check_seal(folder)
    found = json.loads((folder / _STATE).read_text())["round"]
    if found != round_:
        raise DamagedError(f"{folder} is a checkpoint of round {found}, and not of the round in its name")


def _load(file: Path) -> State:
    """In memory of their own: rounds are averaged in place, and the file may go."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def _prefixed(values: Mapping[str, State]) -> State:
    return {f"{prefix}/{name}": tensor for prefix, state in values.items() for name, tensor in state.items()}


def _unprefixed(tensors: State) -> dict[str, State]:
    """The inverse of `_prefixed`."""
    values: dict[str, State] = {}
    for key, tensor in tensors.items():
        prefix, _, name = key.partition("/")
        values.setdefault(prefix, {})[name] = tensor
    return values
