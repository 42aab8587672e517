"""Every text file and every pipe with text names its encoding, so that no locale changes what is read or written."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from helpers import REPOSITORY

PACKAGES = ("kraken_train", "data_prep", "checkpoints", "launch")
FILES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
# Where the mode stands among the arguments; ruff (PLW1514) knows only calls on what it sees to be a path.
POSITION_OF_MODE = {"open": 1, "os.fdopen": 1, ".open": 0}


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines with a call that opens text in the encoding of the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in given or name == "os.open":
            continue
        last = name.rpartition(".")[2]
        if last in ("read_text", "write_text") or (name.startswith("subprocess.") and "text" in given):
            yield call.lineno
        position = POSITION_OF_MODE.get(name, POSITION_OF_MODE[".open"] if name.endswith(".open") else None)
        if position is not None:
            mode = call.args[position] if len(call.args) > position else given.get("mode")
            if mode is None or "b" not in ast.unparse(mode).partition(" if ")[0]:
                yield call.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='rb')", False),
        ("path.open('a')", True),
        ("(folder / 'a').open()", True),
        ("path.open('rb')", False),
        ("open(path, 'r+b' if size else 'wb')", False),
        ("os.open(path, flags)", False),
        ("os.fdopen(number, 'w')", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command)", False),
    ],
)
def test_what_is_found(code: str, found: bool) -> None:
    assert bool(list(without_encoding(ast.parse(code)))) is found


def test_no_text_in_the_encoding_of_the_locale() -> None:
    assert len(FILES) > 100
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in FILES
        for line in without_encoding(ast.parse(path.read_bytes()))
    ]
    assert found == []
