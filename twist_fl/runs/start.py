"""What a command begins with: a run's folder, or a model as it is with its settings beside. Two ways to one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twist_fl.config.finding import is_run, no_run, runs_in
from twist_fl.config.hub import expanded, is_path
from twist_fl.config.schema import Config, load_config
from twist_fl.data.run_text import RunText
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError

if TYPE_CHECKING:
    from twist_fl.data.corpus import Corpus
    from twist_fl.rounds import RunState
    from twist_fl.training.job import Job

_OF_A_MODEL = ("train.workers=1", "blueprint.num_sub=1/1", "eval.sizes=1/1,1/2,1/4", "eval.max_windows=64")
"""Of a model, which nothing trains: all of it in one place, sizes that any has, and text that takes minutes."""
_COUNT = ("seed", "data.", "blueprint.", "eval.", "deploy.", "model.architecture", "train.device", "train.threads")
"""The settings that mean something of a model as it is. A key that ends with a dot is a section."""
_IDLE = ("data.private", "blueprint.num_sub", "blueprint.assign", "eval.every", "eval.federated", "eval.watch_windows")


@dataclass(frozen=True)
class Start:
    """A job, and where results that are made of it go."""

    job: Job
    run: RunFolder | None
    """The run; None of a model."""
    name: str
    """As a person would call it: the run's folder, the model's name."""

    def load(self) -> tuple[Job, RunState]:
        """The job as its state has it, and the state: of a run its newest checkpoint, of a model its weights, round 0.

        Raises ConfigError if there is none, or if the weights are not exactly the model's.
        """
        if self.run is None:
            from twist_fl.rounds import start

            state = start(self.job)
            return self.job.scored(state.scores), state
        loaded = self.run.load()
        if loaded is None:
            raise ConfigError(f"{self.run.path} has no checkpoint yet: let it train for checkpoint_every rounds")
        return self.job.scored(loaded.scores), loaded

    def results(self, out: Path | None = None) -> RunFolder:
        """Where results go: `out`, else the run's folder, or of a model runs/NAME.

        Raises ConfigError if that would be in the model's own folder, or in a run that only has its name.
        """
        if out is not None:
            return RunFolder(out)
        if self.run is not None:
            return self.run
        folder = RunFolder(Path("runs") / self.name)
        what = "a run" if is_run(folder.path) else "a model" if (folder.path / "config.json").is_file() else None
        if what:
            raise ConfigError(f"{folder.path}, where results of {self.name} would go, holds {what}: give --out FOLDER")
        return folder


class _ModelText(RunText):
    """Text that is read when it is first asked for, whatever its hash; its tokens must be the model's."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.data, 1, "")
        self._all = config

    def _read(self) -> Corpus:
        corpus = super()._read()
        from twist_fl.model.hf_config import model_config
        from twist_fl.training.fitting import fit_vocabulary

        fit_vocabulary(self._all, model_config(self._all), corpus)
        return corpus


def find_start(start: Path | str, words: Sequence[str] = ()) -> Start:
    """The run in the folder `start`, or the model that `start` is: a folder, a GGUF file, or a name on the hub.

    `words` (key=value) are settings: of a run, where its text or model lies now; of a model, all that is not its
    default. Raises ConfigError if there is neither, or for a setting that would change nothing.
    """
    path = expanded(start)
    if is_run(path):
        return _run(path, words)
    here = path.exists()
    if (here and runs_in(path)) or (not here and (is_path(str(start)) or _is_named(str(start)))):
        raise no_run(path.resolve())
    return _model(str(start), path, words)


def _is_named(name: str) -> bool:
    return any(name in run.parts for run in runs_in(Path("runs")))


def model_name(start: str) -> str:
    """What folders of a model's results are called by."""
    path = expanded(start)
    return path.stem if path.is_file() else path.resolve().name


def _run(path: Path, words: Sequence[str]) -> Start:
    from twist_fl.runs.resume import FixedError, at_places

    folder = RunFolder(path)
    try:
        return Start(at_places(folder.job(), words), folder, str(path))
    except FixedError as error:
        if not (checkpoints := folder.checkpoints()):
            raise
        raise ConfigError(f"{error}; for a model with other settings, give {checkpoints[-1]}") from error


def _model(start: str, path: Path, words: Sequence[str]) -> Start:
    from twist_fl.model.hf_config import pretrained_config
    from twist_fl.training.job import model_job

    model = pretrained_config(start, start if path.exists() else f"no run {start!r}, and as a model it")
    config = load_config(None, [*_OF_A_MODEL, f"model.pretrained={start}", *words], strict=True)
    for key in (word.partition("=")[0].strip() for word in words):
        counts = any(key == each or (each.endswith(".") and key.startswith(each)) for each in _COUNT)
        if not counts or key in _IDLE:
            raise ConfigError(
                f"{key} changes nothing here: {start} is a model as it is, and nothing trains it. What counts: "
                + ", ".join(f"{each}*" if each.endswith(".") else each for each in _COUNT)
                + f" (not {', '.join(_IDLE)})"
            )
    if not any(word.startswith("data.window=") for word in words):
        config.data.window = min(config.data.window, model.max_position_embeddings)
    return Start(model_job(config, _ModelText(config)), None, model_name(start))
