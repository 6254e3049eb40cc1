"""The way out of every format, ours and a user's: found by its name, written whole or not at all, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twist_fl.system.files import CARD, new_folder
from twist_fl.system.plugins import EXPORT_FORMAT
from twist_fl.system.units import human_bytes
from twist_fl.tickets.card import Source, model_card
from twist_fl.tickets.export import Ticket


@dataclass(frozen=True)
class Exported:
    folder: Path
    """Absolute."""
    num_bytes: int
    """Of its files, without the model card."""
    checked: str | None
    """What the format found when it opened what it had written; None if it does not look."""


def export(
    ticket: Ticket, folder: Path | str, format: str, dtype: str, tokenizer_folder: Path | None, source: Source
) -> Exported:
    """Raises ConfigError where the format cannot hold the ticket, LaunchError where what it wrote is not the ticket."""
    write = EXPORT_FORMAT.find(format)
    target = Path(folder).expanduser().resolve()
    with new_folder(target, sealed=True) as making:
        checked: str | None = write(ticket, making, tokenizer_folder, dtype)
        num_bytes = sum(file.stat().st_size for file in making.rglob("*") if file.is_file())
        card = model_card(ticket, source, format, dtype, checked, human_bytes(num_bytes))
        (making / CARD).write_text(card, encoding="utf-8")
    return Exported(target, num_bytes, checked)
