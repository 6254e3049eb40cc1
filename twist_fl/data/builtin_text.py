"""Real English text that every CPython carries, for runs without a network or a data set.

The language reference (`pydoc_data.topics`) and the docstrings of the standard library, about 2 MB. The text
depends on the Python version; its hash is part of a run's identity.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from twist_fl.system.errors import DamagedError
from twist_fl.system.files import cache_dir, check_seal, new_folder, read_json, write_json

_FOUND = "documents.json"
_SHORTEST = 200
"""Characters below which a docstring is a label rather than text."""
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}


@cache
def documents() -> tuple[str, ...]:
    """Topics of the language reference, then one document per standard library module: its docstrings.

    To parse the library takes seconds: what was found is in the cache until a file of it changes.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path for path in library.rglob("*.py") if not _SKIP.intersection(path.relative_to(library).parts))
    folder = cache_dir() / "builtin" / _digest(names)
    with suppress(DamagedError):  # or not there
        check_seal(folder)
        return tuple(read_json(folder / _FOUND, list))
    found = tuple(_documents(names))
    with new_folder(folder, sealed=True) as making:
        write_json(found, making / _FOUND)
    return found


def _digest(modules: Sequence[Path]) -> str:
    about = [(str(path), status.st_size, status.st_mtime_ns) for path in modules for status in [path.stat()]]
    return hashlib.sha256(repr((sys.version, about)).encode()).hexdigest()


def _documents(modules: Sequence[Path]) -> Iterator[str]:
    for name in sorted(topics):
        yield topics[name]
    for path in modules:
        text = "\n\n".join(doc for doc in _docstrings(path) if len(doc) >= _SHORTEST)
        if text:
            yield text


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a handful of templates under the library are not Python
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            if doc:
                yield inspect.cleandoc(doc)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """`ast.walk` without expressions, which hold no docstrings and are most of a tree: the same order."""
    waiting = deque[ast.AST]([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, part, ()))
