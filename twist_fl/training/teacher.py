"""Distillation: what a teacher expects at each place of a worker's text, asked once a window."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twist_fl.config.schema import Config
from twist_fl.data.corpus import Windows
from twist_fl.model.saved import open_model
from twist_fl.system.files import cache_dir
from twist_fl.training.fitting import check_weights
from twist_fl.training.loss import SoftTargets

TOP = 64
"""Tokens that are kept of the teacher's expectation at a place, its likeliest; they are taken for all of it."""
_PROBABILITY = np.dtype(np.float16)


class Teacher:
    """An open teacher, and what it has said about windows of one text."""

    def __init__(self, model: Any, weight: float, vocabulary: int, windows: Windows) -> None:
        self._model, self._weight, self._windows, self._device = model, weight, windows, model.device
        self._top = min(TOP, vocabulary)
        self._seen = np.zeros(len(windows), bool)
        shape = (*windows[:, 1:].shape, self._top)
        self._tokens = _scratch(shape, _id_dtype(vocabulary))
        self._shares = _scratch(shape, _PROBABILITY)

    def targets(self, index: npt.NDArray[np.int64]) -> SoftTargets:
        """Of the windows with these ids: `train.distill` of it as the teacher expects, the rest what stands there."""
        for window in index:
            if not self._seen[window]:
                self._ask(window)
        expected = torch.from_numpy(self._shares[index].astype(np.float32)).flatten(0, 1)  # (B (T-1), K)
        tokens = torch.from_numpy(self._tokens[index].astype(np.int64)).flatten(0, 1)
        true = torch.from_numpy(self._windows[index][:, 1:].astype(np.int64)).flatten()[:, None]
        mixed = self._weight * expected / expected.sum(1, keepdim=True)
        shares = torch.cat([torch.full_like(mixed[:, :1], 1 - self._weight), mixed], 1)
        return SoftTargets(torch.cat([true, tokens], 1).to(self._device), shares.to(self._device))

    @torch.inference_mode()
    def _ask(self, window: int) -> None:
        """One window by itself, so that the answer does not hang on those beside it."""
        tokens = torch.tensor(self._windows[window : window + 1], dtype=torch.int64, device=self._device)
        logits = self._model(tokens, use_cache=False).logits[0, :-1].float()
        shares, likeliest = logits.softmax(1).topk(self._top)
        self._tokens[window], self._shares[window] = likeliest.cpu().numpy(), shares.cpu().numpy()
        self._seen[window] = True


def open_teacher(config: Config, digest: str | None, device: str) -> Any:
    """The model in `train.teacher`. Raises ConfigError where it is not, or is not that of `digest`."""
    check_weights(config, digest)
    return open_model(Path(str(config.train.teacher))).float().to(device).eval()


def bytes_per_token(vocabulary: int) -> int:
    """Of disk, for what is kept of the teacher's expectation."""
    return min(TOP, vocabulary) * (_id_dtype(vocabulary).itemsize + _PROBABILITY.itemsize)


def _id_dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def _scratch(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array in a file without a name, which ends with the process; what is not written takes up no room."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache_dir()) as file:
        return np.memmap(file, dtype, "w+", shape=shape)
