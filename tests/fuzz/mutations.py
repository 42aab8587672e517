"""Damage to files: hypothesis draws a `Change` from integers, so that it also shrinks it.

A change is either of bytes (any file), of the file as such (gone, a folder, a pipe, a link), or of the structure of a
file that holds JSON or YAML, also where that is the header of a safetensors file or is compressed.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
import zstandard
from hypothesis import strategies as st

COMMAND_LINE = "arguments.json"  # is no file for a program
MARK = "\ue123the value that is replaced\ue123"
# Values in place of another one, as text of a file.
VALUES = [
    b"null", b"true", b"false", b"0", b"-1", b"1", b"3", b"0.5", b"-0.0", b"1e400", b"-1e400", b"NaN", b"Infinity",
    b"2147483647", b"2147483648", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809",
    b"1" + b"0" * 30, b"7" * 5000, b'""', b'"x"', b'"7"', b'"' + b"long " * 30_000 + b'"', b'"\\ud800"', b'"\xff\xfe"',
    b'"a\\u0000b"', b'"\\u001b[2J"', b'"../../../etc/passwd"', b'"/etc/passwd"', b'"."', b'".."', b"[]", b"{}", b"[[]]",
    b"[null]", b'[""]', b"[{}]", b'{"": null}', b'{"a": 1, "a": "twice"}', b'{"x": {"y": [1, "z"]}}',
    b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"[0, 0, 0]", b"[-1]", b"[1, 2]",
    b"[9223372036854775807, 9223372036854775807]", b"[0, 99999999999]", b"", b"}", b"// no JSON",
]  # fmt: skip
YAML_VALUES = [
    b"!!python/object/apply:os.mkdir [/tmp/was-run]", b"&a [*a]", b"*unknown", b"2026-01-31", b"!!int x", b"!!bool x",
    b"!!timestamp x", b"!!binary x", b"!!set {a}", b"{? [a] : b}", b"{? {a: b} : c}", b".inf", b"1_000", b"${a}",
    b"${oc.env:HOME}", b"!!float x", b"=", b"- a\n b: c",
    b"[&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b], "
    b"&d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], "
    b"&g [*f,*f,*f,*f,*f,*f,*f,*f,*f], &h [*g,*g,*g,*g,*g,*g,*g,*g,*g], &i [*h,*h,*h,*h,*h,*h,*h,*h,*h]]",
]  # fmt: skip
NUMBERS = [0, 1, 2, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
MOST_NODES = 100_000
JSON_KINDS, LINE_KINDS, YAML_KINDS = (".json",), (".jsonl",), (".yaml",)


@dataclass(frozen=True)
class Change:
    """One damage to the file `file`; `at`, `what` and `size` are numbers whose meaning depends on `kind`."""

    file: str
    kind: str
    at: int
    what: int
    size: int

    def apply(self, folder: Path) -> None:
        """Raises nothing where an earlier change has removed what this one is about."""
        path = folder / self.file
        if path.is_symlink() or not path.is_file():
            return
        if self.kind in FILE_CHANGES:
            path.unlink()
            FILE_CHANGES[self.kind](path)
        elif self.kind in BYTE_CHANGES:
            path.write_bytes(BYTE_CHANGES[self.kind](path.read_bytes(), self.at, self.what, self.size))
        else:
            path.write_bytes(changed_structure(path, self))


def changes(files: list[str]) -> st.SearchStrategy[list[Change]]:
    """One to three changes of these files, of their structure where they have one."""
    return st.lists(st.sampled_from(files).flatmap(change_of), min_size=1, max_size=3)


def change_of(file: str) -> st.SearchStrategy[Change]:
    kinds = [*BYTE_CHANGES, *BYTE_CHANGES]
    if file != COMMAND_LINE:
        kinds += FILE_CHANGES
    if structure_of(file) is not None:
        kinds = [*STRUCTURE_CHANGES] * 6 + kinds
    near_the_begin = st.integers(0, 60)
    return st.builds(
        Change,
        st.just(file),
        st.sampled_from(kinds),
        st.one_of(near_the_begin, st.integers(0, 1 << 20), st.integers(-60, -1)),
        st.integers(0, 1 << 16),
        st.one_of(st.integers(1, 9), st.integers(1, 1 << 12)),
    )


# ---------------------------------------------------------------------------------------------------------------
# Files and bytes
# ---------------------------------------------------------------------------------------------------------------


def link_outside(path: Path) -> None:
    """A link to a file of the same kind, with content that is valid JSON and YAML, outside of the artefact."""
    outside = path.parent / ".outside"
    while outside.parent.name != "case":
        outside = outside.parent.parent / ".outside"
    outside = outside.parent.parent / "outside"
    outside.write_text("{}\n", encoding="utf-8")
    path.symlink_to(outside)


FILE_CHANGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: None,
    "empty": lambda path: path.touch(),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link outside": link_outside,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


def flip(data: bytes, at: int, what: int, size: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << what % 8]) + data[at + 1 :] if data else data


def bounded(change: Callable[[bytes, int, int, int], bytes]) -> Callable[[bytes, int, int, int], bytes]:
    """`at` as a position of the data; a negative one counts from the end."""
    return lambda data, at, what, size: change(data, at % max(1, len(data)), what, size)


BYTE_CHANGES: dict[str, Callable[[bytes, int, int, int], bytes]] = {
    "flip": bounded(flip),
    "cut": bounded(lambda data, at, what, size: data[:at]),
    "insert": bounded(
        lambda data, at, what, size: data[:at] + bytes((what + i) % 256 for i in range(size)) + data[at:]
    ),
    "zero": bounded(lambda data, at, what, size: data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]),
    "remove": bounded(lambda data, at, what, size: data[:at] + data[at + size :]),
    "repeat": bounded(lambda data, at, what, size: data[:at] + data[at : at + size] * 2 + data[at + size :]),
    "number of 8 bytes": bounded(
        lambda data, at, what, size: data[:at] + struct.pack("<Q", NUMBERS[what % len(NUMBERS)]) + data[at + 8 :]
    ),
    "number of 4 bytes": bounded(
        lambda data, at, what, size: data[:at] + struct.pack("<Q", NUMBERS[what % len(NUMBERS)])[:4] + data[at + 4 :]
    ),
}


# ---------------------------------------------------------------------------------------------------------------
# Structure
# ---------------------------------------------------------------------------------------------------------------

STRUCTURE_CHANGES = ("value", "value", "drop", "copy", "rename", "double")


def structure_of(file: str) -> str | None:
    """What holds a tree in the file: json, lines, yaml or safetensors."""
    if file.endswith(".jsonl.zst"):
        return "zst"
    suffix = Path(file).suffix
    return {".json": "json", ".jsonl": "lines", ".yaml": "yaml", ".safetensors": "safetensors"}.get(suffix)


def changed_structure(path: Path, change: Change) -> bytes:
    """The content of the file with one node of its tree changed; unchanged where it has no tree any more."""
    data, kind = path.read_bytes(), structure_of(change.file)
    try:
        if kind == "zst":
            lines = zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 22)
            return zstandard.ZstdCompressor().compress(changed_line(lines, change))
        if kind == "lines":
            return changed_line(data, change)
        if kind == "safetensors":
            (size,) = struct.unpack_from("<Q", data)
            header = changed_tree(json.loads(data[8 : 8 + size]), change, VALUES)
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
        if kind == "yaml":
            return changed_tree(yaml.safe_load(data), change, YAML_VALUES * 2 + VALUES)
        return changed_tree(json.loads(data), change, VALUES)
    except (ValueError, TypeError, struct.error, zstandard.ZstdError, yaml.YAMLError, RecursionError):
        return data


def changed_line(data: bytes, change: Change) -> bytes:
    lines = data.splitlines()
    number = change.size % len(lines)
    lines[number] = changed_tree(json.loads(lines[number]), change, VALUES)
    return b"\n".join(lines) + b"\n"


def changed_tree(tree: Any, change: Change, values: list[bytes]) -> bytes:
    """JSON (which is YAML too) of `tree` with its node number `at` changed; `what` chooses the value.

    Raises ValueError for a tree that is too large.
    """
    nodes = list(islice(nodes_of(tree), MOST_NODES))
    if len(nodes) == MOST_NODES:
        raise ValueError("an earlier change has made a tree of aliases that has no end")
    if not nodes:
        return values[change.what % len(values)]
    parent, key = nodes[change.at % len(nodes)]
    value: bytes | None = None
    if change.kind == "value":
        parent[key], value = MARK, values[change.what % len(values)]
    elif change.kind == "drop":
        del parent[key]
    elif change.kind == "copy":  # of another node
        other, name = nodes[change.what % len(nodes)]
        value = json.dumps(other[name], default=str).encode()
        parent[key] = MARK
    elif change.kind == "rename" and isinstance(parent, dict):
        names = ["", "x", "../x", "/etc/passwd", "\x00", "long" * 10_000, str(key).upper(), f"{key} ", "__class__"]
        parent[names[change.what % len(names)]] = parent.pop(key)
    else:  # the key twice, or the item
        again = f"{json.dumps(str(key))}: " if isinstance(parent, dict) else ""
        once = json.dumps(parent[key], default=str)
        value = f"{once}, {again}".encode() + values[change.what % len(values)]
        parent[key] = MARK
    text = json.dumps(tree, indent=1, ensure_ascii=False, default=str).encode(errors="surrogatepass")
    return text if value is None else text.replace(json.dumps(MARK, ensure_ascii=False).encode(), value, 1)


def nodes_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(mapping or list, key or index) of each node below `tree`."""
    for key, value in list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from nodes_of(value)
