"""The documentation of the running Python's standard library: about 2 MB of English that is always at hand.

Modules are parsed, never imported. A document is all docstrings of one module, each under its name.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.documents import START, WHOLE, Cursor, DocumentsOfBlocks, Part
from data_prep.records import Values
from kraken_train.common.errors import DataError

# Tests, installed packages, generated tables and demos: not documentation, or not of the standard library.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo",
            "_bundled", "__pycache__"}  # fmt: skip

Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class EmbeddedSource(DocumentsOfBlocks):
    """Raises DataError if this Python comes without its library's source files."""

    kind = "embedded"
    location = "embedded"

    def __init__(self) -> None:
        self.fraction = 0.0
        self.folder = Path(sysconfig.get_paths()["stdlib"])
        files = (file.relative_to(self.folder) for file in self.folder.rglob("*.py"))
        self.files = sorted((f for f in files if not LEFT_OUT.intersection(f.parts)), key=lambda f: f.as_posix())
        if not self.files:
            raise DataError(f"source=embedded: this Python has no library sources in {self.folder}; use another source")

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "location": self.location, "python": platform.python_version()}

    def blocks(self, start: Cursor = START, part: Part = WHOLE) -> Iterator[tuple[Cursor, Values]]:
        """A block for each module that has docstrings."""
        begin, end = part.bounds(len(self.files))
        for number in range(max(begin, start[0]), end):
            file = self.folder / self.files[number]
            module = ".".join(self.files[number].with_suffix("").parts).removesuffix(".__init__")
            text = "\n\n".join(_descriptions(_parse(file), module))
            self.fraction = (number + 1 - begin) / (end - begin)
            # A module without docstrings is nothing left out, so it is not reported as an empty record.
            if text:
                yield (number + 1, 0), Values([(str(file), text + "\n")], len(text))


def _parse(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in literals are not ours to report
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return ast.Module(body=[], type_ignores=[])  # some distributions ship templates named .py


def _descriptions(node: Described, name: str) -> Iterator[str]:
    """Each docstring in `node` under its qualified name and arguments, in the order of the file."""
    docstring = ast.get_docstring(node)
    if docstring:
        arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
        yield f"{name}{arguments}\n\n{docstring}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _descriptions(child, f"{name}.{child.name}")
