"""Tables in a document, and where their numbers are from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def fill(text: str, found: Mapping[str, str]) -> str:
    """`text` with each table between `<!-- table: NAME -->` and `<!-- /table -->` as it is in `found`.

    A table that is not in `found` stays. Raises KeyError for one that has no place in the text.
    """
    for name, table in found.items():
        place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- /table -->)", re.DOTALL)
        if not place.search(text):
            raise KeyError(f"no place for table {name!r}: write <!-- table: {name} --> and <!-- /table --> around it")
        text = place.sub(lambda match, new=table: match[1] + new + match[2], text)  # type: ignore[misc]
    return text


def origin(found: Mapping[str, Any]) -> str:
    machine = found["hardware"]
    load = f", load {found['load_before']:.1f} before" if "load_before" in found else ""
    where = f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores"
    return f"*{short_commit(found['commit'])}, {where}, torch {found['torch']}{load}*"


def short_commit(commit: str | None) -> str:
    """Seven digits, and the plus of a changed tree."""
    return commit[:7] + "+" * commit.endswith("+") if commit else "no commit"
