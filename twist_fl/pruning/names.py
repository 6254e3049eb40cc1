"""The pruning methods by name; no torch."""

from __future__ import annotations

from twist_fl.config.suggest import nearest
from twist_fl.system.errors import ConfigError

TICKETS = ("se", "se-unscaled")
CALIBRATED = ("sparsegpt", "wanda", "zpruner", "block")
METHODS = (*CALIBRATED, *TICKETS, "magnitude")


def chosen_methods(names: str) -> list[str]:
    """METHODS of a list as "sparsegpt,wanda", or all. Raises ConfigError for a name that is none."""
    if names == "all":
        return list(METHODS)
    chosen = names.split(",")
    for name in chosen:
        if name not in METHODS:
            near = nearest(name, METHODS)
            raise ConfigError(f"--method {name!r} is no pruning method{near}; there are {', '.join(METHODS)}, or all")
    return chosen
