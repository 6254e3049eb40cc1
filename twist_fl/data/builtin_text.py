"""Real English text that every CPython carries, for runs without a network or a data set.

The language reference (`pydoc_data.topics`) and the docstrings of the standard library, about 2 MB. The text
depends on the Python version; its hash is part of a run's identity.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

_SHORTEST = 200
"""Characters below which a docstring is a label rather than text."""
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}


@cache
def documents() -> tuple[str, ...]:
    """Topics of the language reference, then one document per standard library module: its docstrings."""
    return tuple(_documents())


def _documents() -> Iterator[str]:
    for name in sorted(topics):
        yield topics[name]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not _SKIP.intersection(path.relative_to(library).parts):
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
