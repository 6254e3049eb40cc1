"""Where a client keeps the optimiser state of shared parameters (train.optimizer_state=client).

On disk, because neither Flower's simulation nor a SuperNode promises the same process for the next round;
one file per worker and round, so that a run resumed from an older checkpoint finds that round's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file

from twist_fl.data import cache_dir
from twist_fl.files import save_tensors
from twist_fl.train import MOMENTS, Moments


def moment_folder(run_id: str) -> Path:
    """Where this machine keeps client-side optimiser state of the run."""
    return cache_dir() / "moments" / run_id


class MomentShelf:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _rounds(self, worker: int) -> dict[int, Path]:
        files = self.folder.glob(f"worker-{worker}-round-*.safetensors")
        return {int(file.stem.rpartition("-")[2]): file for file in files}

    def load(self, worker: int, round_: int) -> Moments | None:
        """The newest state from before `round_`. Later ones belong to an abandoned continuation and are removed."""
        found = self._rounds(worker)
        for later in [r for r in found if r >= round_]:
            found.pop(later).unlink()
        if not found:
            return None
        tensors = load_file(found[max(found)])
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
