"""What is known of a command's settings: types and comments of its dataclass, defaults and choices in conf/."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf

from kraken_train.common.free_text import FreeText
from kraken_train.common.settings import OneOf, field_types

CONF = Path(__file__).resolve().parents[2] / "conf"
MISSING = "???"  # Hydra's mark of a setting without a default
SIMPLE_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null", Any: "any"}
PLURALS = {"integer": "integers", "number": "numbers", "text": "texts", "path": "paths"}


# ---------------------------------------------------------------------------------------------------------------
# Types
# ---------------------------------------------------------------------------------------------------------------


def nested_schemas(kind: Any) -> list[type]:
    """The dataclasses that describe the settings within a setting: one, or several of which one is chosen."""
    if dataclasses.is_dataclass(kind):
        return [typing.cast(type, kind)]
    marks = kind.__metadata__ if typing.get_origin(kind) is typing.Annotated else ()
    return [schema for mark in marks if isinstance(mark, OneOf) for schema in mark.schemas]


def type_name(kind: Any) -> str:
    """`int | None` as "integer or null"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        marks = [mark for mark in arguments[1:] if isinstance(mark, FreeText)]
        return "path" if any(mark.is_path for mark in marks) else type_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(type_name(argument) for argument in arguments))
    if origin in (tuple, list):
        item = type_name(arguments[0])
        return f"list of {PLURALS.get(item, item)}"
    if origin is dict or kind is dict:
        return "mapping"
    if origin is typing.Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    return SIMPLE_TYPES.get(kind, getattr(kind, "__name__", str(kind)))


# ---------------------------------------------------------------------------------------------------------------
# Meanings
# ---------------------------------------------------------------------------------------------------------------


def field_comments(schema: type) -> dict[str, str]:
    """The comment of each field of a dataclass: on its own line, or on the lines above it."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if dataclasses.is_dataclass(base):
            found |= comments_of_source(textwrap.dedent(inspect.getsource(base)))
    return found


def comments_of_source(source: str) -> dict[str, str]:
    lines = source.splitlines()
    found = {}
    for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = comment_lines_before(lines, node.lineno - 1)
            behind = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset :].decode()
            beside = [behind.split("#", 1)[1].strip()] if "#" in behind else []
            if above or beside:
                found[node.target.id] = " ".join(above + beside)
    return found


def comment_lines_before(lines: list[str], index: int) -> list[str]:
    """The lines of comment above line `index`; none if they are the heading of a paragraph."""
    first = index
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    if first == 0 or not lines[first - 1].strip():
        return []
    return [line.lstrip("# ").strip() for line in lines[first:index]]


def yaml_comments(path: Path) -> dict[str, str]:
    """The comment of each setting of a YAML file, by dotted name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for index, line in enumerate(lines):
        match = re.fullmatch(r"( *)([A-Za-z_]\w*):(.*?)(?:(?<= )# ?(.*))?", line)
        if match is None:
            continue
        indent, name, _, beside = match.groups()
        parents = [parent for parent in parents if parent[0] < len(indent)] + [(len(indent), name)]
        comment = " ".join([*comment_lines_before(lines, index), *([beside] if beside else [])])
        if comment:
            found[".".join(name for _, name in parents)] = comment
    return found


# ---------------------------------------------------------------------------------------------------------------
# Defaults and choices
# ---------------------------------------------------------------------------------------------------------------


def composed_defaults(config_name: str) -> dict[str, Any]:
    """The settings that a command has without arguments; MISSING for those that must be given."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        settings = OmegaConf.to_container(hydra.compose(config_name), resolve=False, throw_on_missing=False)
    return {str(key): value for key, value in typing.cast(dict[Any, Any], settings).items()}


def chosen_groups(config_name: str) -> dict[str, str | None]:
    """The groups of conf/ that a command takes settings from, with the file that is chosen by default."""
    defaults = yaml.safe_load((CONF / f"{config_name}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    entries = [entry for entry in defaults if isinstance(entry, dict)]
    return {
        name: choice for entry in entries for name, choice in entry.items() if (CONF / name).is_dir()
    }  # not "override hydra/..."


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def all_comments(config_name: str) -> dict[str, str]:
    """`yaml_comments` of a command's file and of the files that are chosen by default."""
    found: dict[str, str] = {}
    for group, choice in chosen_groups(config_name).items():
        if choice is not None:
            comments = yaml_comments(CONF / group / f"{choice}.yaml")
            found |= {f"{group}.{key}": comment for key, comment in comments.items()}
    return found | yaml_comments(CONF / f"{config_name}.yaml")


def meaning(schema: type, name: str, prefix: str, comments: dict[str, str]) -> str:
    """What a setting means: the comment of its field, else the one in conf/."""
    return field_comments(schema).get(name) or comments.get(prefix + name, "")


def ordered_fields(schema: type, defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass and their types, in the order of conf/."""
    kinds = field_types(schema, include_extras=True)
    known = [name for name in defaults if name in kinds]
    return {name: kinds[name] for name in [*known, *(name for name in kinds if name not in known)]}


def field_default(schema: type, name: str) -> Any:
    """The dataclass's own default of a setting; MISSING if it has none."""
    entry = next(entry for entry in dataclasses.fields(schema) if entry.name == name)
    if entry.default is not dataclasses.MISSING:
        return entry.default
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else MISSING
