"""Names of our modules in strings and in documentation: each is a module, or something in one, that exists.

The diagnosis of hangs and the launcher compare such strings with the names of modules, processes and threads, where a
module that moves would go unnoticed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY

from kraken_train.health.stack_dump import BACKGROUND_THREADS

PACKAGES = ("kraken_train", "data_prep", "checkpoints", "launch", "studies")
NAME = rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+"
SOURCES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for folder in ("docs", "studies") for page in sorted((REPOSITORY / folder).rglob("*.md"))),
]
NOT_MODULES = {"checkpoints.damaged"}  # a folder
FILE_ENDINGS = ("py", "yaml", "md", "png", "egg")


@functools.cache
def exists(name: str) -> bool:
    """Whether `name` is a module, or an attribute of a module or of one of its classes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name is not None and not name.startswith(error.name):
                return True  # a module that needs a package which is not installed here, such as Triton
            continue
        for attribute in parts[count:]:
            if attribute in getattr(found, "__annotations__", {}):
                return True
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def can_be_started(name: str) -> bool:
    """Whether `python -m name` does more than to define things."""
    program = ast.parse((REPOSITORY / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in program.body)


def test_strings_that_are_module_names() -> None:
    found = {text for path in SOURCES for text in strings(path) if re.fullmatch(NAME, text)}
    assert {"kraken_train.parallel.distributed", "launch.node"} <= found
    assert not [name for name in sorted(found - NOT_MODULES) if not exists(name)]


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_names_in_documentation(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = {name for name in re.findall(rf"`({NAME})`", text) if not name.endswith(FILE_ENDINGS)}
    commands = set(re.findall(rf"python -m ({NAME})", text))
    assert not [name for name in sorted(names | commands) if not exists(name)]
    assert not [name for name in sorted(commands) if not can_be_started(name)]


@pytest.mark.parametrize("watcher", BACKGROUND_THREADS)
def test_threads_that_only_watch(watcher: str) -> None:
    """The names with which threads are started."""
    names = [
        ast.unparse(keyword.value)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "name"
    ]
    assert [name for name in names if name.lstrip("f").startswith((f"'{watcher}", f'"{watcher}'))]
