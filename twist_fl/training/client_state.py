"""Where a client keeps the optimiser state of shared parameters (train.optimizer_state=client).

On disk, because neither Flower's simulation nor a SuperNode promises the same process for the next round;
one sealed folder per worker and round, so that a run resumed from an older checkpoint finds that round's state, and one
that is damaged is not used.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from safetensors.torch import load_file

from twist_fl.blueprint.moments import MOMENTS
from twist_fl.system.files import cache_dir, check_seal, new_folder, save_tensors
from twist_fl.training.interval import Moments

_NAME = re.compile(r"worker-(\d{1,18})-round-(\d{1,18})", re.ASCII)
_FILE = "moments.safetensors"


def moment_folder(run_id: str) -> Path:
    """Where this machine keeps client-side optimiser state of the run."""
    return cache_dir() / "moments" / run_id


def take_moments(run_id: str, kept: Path) -> None:
    """A finished run goes on: what it had `kept` is the clients' again."""
    if kept.is_dir():
        with new_folder(moment_folder(run_id)) as making:
            shutil.copytree(kept, making, dirs_exist_ok=True)
        shutil.rmtree(kept)


def keep_moments(run_id: str, kept: Path, rounds: Iterable[int]) -> None:
    """A run is finished: leave nothing in the cache, and in `kept` what going on after one of `rounds` needs."""
    folder = moment_folder(run_id)
    if not folder.is_dir():
        return
    workers = {int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    with new_folder(kept) as making:
        for worker, round_ in product(workers, rounds):
            if state := MomentShelf(folder).before(worker, round_ + 1):
                shutil.copytree(state, making / state.name, dirs_exist_ok=True)
    shutil.rmtree(folder)


class MomentShelf:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _rounds(self, worker: int) -> dict[int, Path]:
        found = [(_NAME.fullmatch(path.name), path) for path in self.folder.glob(f"worker-{worker}-round-*")]
        return {int(match[2]): path for match, path in found if match}

    def before(self, worker: int, round_: int) -> Path | None:
        """The newest state from before `round_`."""
        found = {r: path for r, path in self._rounds(worker).items() if r < round_}
        return found[max(found)] if found else None

    def load(self, worker: int, round_: int) -> Moments | None:
        """The newest state from before `round_`. Raises DamagedError if it is not as it was written.

        Later ones belong to an abandoned continuation and are removed, and so is what a worker that was killed had half
        written: nobody else writes of this worker while it is asked to train.
        """
        later = [path for r, path in self._rounds(worker).items() if r >= round_]
        for path in (*later, *self.folder.glob(f".worker-{worker}-round-*")):
            shutil.rmtree(path, ignore_errors=True)
        newest = self.before(worker, round_)
        if newest is None:
            return None
        check_seal(newest)
        tensors = load_file(newest / _FILE)
        values = {
            moment: {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(moment + "/")}
            for moment in MOMENTS
        }
        return Moments(int(tensors["step"]), values)

    def save(self, worker: int, round_: int, moments: Moments, names: Iterable[str], keep_from: int) -> None:
        """Keep the state of the parameters `names` after `round_`; drop what no resumed run could ask for."""
        import torch

        tensors = {f"{moment}/{name}": moments.values[moment][name] for moment in MOMENTS for name in names}
        tensors["step"] = torch.tensor(moments.step)
        with new_folder(self.folder / f"worker-{worker}-round-{round_}", sealed=True) as making:
            save_tensors(tensors, making / _FILE)
        found = self._rounds(worker)
        needed = max((r for r in found if r <= keep_from), default=0)
        for old in [r for r in found if r < needed]:
            shutil.rmtree(found[old], ignore_errors=True)
