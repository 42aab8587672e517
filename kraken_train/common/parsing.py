"""JSON and YAML from files that a stranger may have written: what cannot be used is a ValueError, whatever it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any

import yaml

DEEPEST = 100  # levels; what walks through a tree calls itself once for each
MOST_DIGITS = 20  # of a whole number, as 2^64 has; a longer one is read as a float


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, also for a text that is nested too deeply."""
    try:
        value = json.loads(content, parse_int=whole_number)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from error
    text = content.decode(errors="replace") if isinstance(content, bytes) else content
    require_unicode(text, value)
    if text.count("[") + text.count("{") > DEEPEST:
        require_flat(value)
    return value


def parse_mapping(content: bytes | str) -> dict[str, Any]:
    """The object of a JSON text. Raises ValueError, also for any other value."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def parse_yaml(content: bytes | str) -> Any:
    """The value of a YAML text, of plain types alone. Raises ValueError, also for what contains itself."""
    try:
        value = yaml.safe_load(content)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from error
    except (yaml.YAMLError, AttributeError, IndexError, KeyError, TypeError) as error:  # the latter for `!!bool x`
        raise ValueError(f"it is no YAML ({str(error).splitlines()[0]})") from error
    require_flat(value)
    require_unicode(content.decode(errors="replace") if isinstance(content, bytes) else content, value)
    return value


def require_unicode(text: str, value: Any) -> None:
    """Raises ValueError where an escape of `text` has made half of a character in `value`, which cannot be written.

    Those with which Python stands for bytes of names of files that are no UTF-8 can.
    """
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False, default=str).encode(errors="surrogateescape")


def whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def require_flat(value: Any) -> None:
    """Raises ValueError for a tree of more than DEEPEST levels, and for one that repeats its parts again and again."""
    level, seen = [value], 0
    for _ in range(DEEPEST):
        level = [child for node in level for child in children(node)]
        seen += len(level)
        if seen > 10_000_000:
            raise ValueError("it repeats parts of itself")
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def children(node: Any) -> list[Any]:
    """The mappings and lists in a mapping or a list."""
    values = node.values() if isinstance(node, dict) else node
    return [value for value in values if isinstance(value, dict | list)] if isinstance(node, dict | list) else []


def well_typed(record: Mapping[str, Any], types: Mapping[str, type | UnionType]) -> dict[str, Any]:
    """`record` without those entries of `types` that have another type."""
    return {key: value for key, value in record.items() if key not in types or has_type(value, types[key])}


def find_wrong_type(record: Mapping[str, Any], types: Mapping[str, type | UnionType]) -> str | None:
    """The first entry of `types` that has another type; None: there is none."""
    return next((key for key, kind in types.items() if key in record and not has_type(record[key], kind)), None)


def has_type(value: object, kind: type | UnionType) -> bool:
    """A truth value is no number, no number is longer than 64 bits, and no text has the character of value 0."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and abs(value) >= 2**64:
        return False
    return isinstance(value, kind) and not (isinstance(value, str) and "\0" in value)
