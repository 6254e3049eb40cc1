"""Where a client keeps the optimiser state of shared parameters (train.optimizer_state=client).

On disk, because neither Flower's simulation nor a SuperNode promises the same process for the next round;
one file per worker and round, so that a run resumed from an older checkpoint finds that round's state.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from safetensors.torch import load_file

from twist_fl.data.corpus import cache_dir
from twist_fl.system.files import new_folder, save_tensors
from twist_fl.training.interval import MOMENTS, Moments


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
    workers = {int(file.name.split("-")[1]) for file in folder.glob("worker-*")}
    with new_folder(kept) as making:
        for worker, round_ in product(workers, rounds):
            if file := MomentShelf(folder).before(worker, round_ + 1):
                shutil.copyfile(file, making / file.name)
    shutil.rmtree(folder)


class MomentShelf:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _rounds(self, worker: int) -> dict[int, Path]:
        files = self.folder.glob(f"worker-{worker}-round-*.safetensors")
        return {int(file.stem.rpartition("-")[2]): file for file in files}

    def before(self, worker: int, round_: int) -> Path | None:
        """The newest state from before `round_`."""
        found = {r: file for r, file in self._rounds(worker).items() if r < round_}
        return found[max(found)] if found else None

    def load(self, worker: int, round_: int) -> Moments | None:
        """The newest state from before `round_`. Later ones belong to an abandoned continuation and are removed."""
        for r, later in self._rounds(worker).items():
            if r >= round_:
                later.unlink()
        newest = self.before(worker, round_)
        if newest is None:
            return None
        tensors = load_file(newest)
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
        save_tensors(tensors, self.folder / f"worker-{worker}-round-{round_}.safetensors")
        found = self._rounds(worker)
        needed = max((r for r in found if r <= keep_from), default=0)
        for old in [r for r in found if r < needed]:
            found[old].unlink()
