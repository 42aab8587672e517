"""What each setting means: the comment beside, or above, the field of its dataclass.

The comments in conf/ repeat these descriptions, which a test checks. `--help` and the documentation show them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from kraken_train.common.settings import OneOf, choices_of

WIDTH = 120  # of a line
# Indentation, name and all but the comment of a line that sets something.
SETTING = re.compile(r"""(?=( *)([\w/]+):(?:\s|$))((?:"[^"]*"|'[^']*'|[^\s"'#]|(?<=\S)["'#]|[ ]+(?!#))*)""")


@dataclass(frozen=True)
class SettingDoc:
    type: str  # as the dataclass has it
    description: str


def describe(schema: type, prefix: str = "") -> dict[str, SettingDoc]:
    """The settings of a dataclass by their dotted names, those of nested dataclasses and of all choices included."""
    found: dict[str, SettingDoc] = {}
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        kind, name = hints[field.name], prefix + field.name
        marks = kind.__metadata__ if get_origin(kind) is Annotated else ()
        nested = [kind] if dataclasses.is_dataclass(kind) else list(choices_of(kind).values())
        nested += [part for mark in marks if isinstance(mark, OneOf) for part in mark.schemas]
        for part in nested:
            found |= {key: doc for key, doc in describe(part, f"{name}.").items() if key not in found}  # type: ignore[arg-type]
        if not nested:
            found[name] = SettingDoc(type_name(kind), comment_of(schema, field.name))
    return found


def type_name(kind: Any) -> str:
    """A type as a user knows it: `int`, `text`, `list of text`, `int or null`."""
    if get_origin(kind) is Annotated:
        return type_name(get_args(kind)[0])
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return "list of " + " and ".join(dict.fromkeys(type_name(part) for part in arguments if part is not ...))
    if get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "mapping"
    if (
        get_origin(kind) is not None
        and type(None) not in arguments
        and not any(map(dataclasses.is_dataclass, arguments))
    ):
        return " or ".join(dict.fromkeys(str(part) if isinstance(part, str) else type_name(part) for part in arguments))
    if arguments:
        return " or ".join(dict.fromkeys(type_name(part) for part in arguments))
    return {str: "text", type(None): "null", bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))


def comment_of(schema: type, field: str) -> str:
    """The comment of a field, of the class that defines it; empty if it has none."""
    for owner in schema.__mro__:
        if field in vars(owner).get("__annotations__", {}):
            return field_comments(owner).get(field, "")
    return ""


@functools.cache
def field_comments(schema: type) -> dict[str, str]:
    """The comments of the fields that a class itself defines: at the end of the line, or in the lines above."""
    lines = textwrap.dedent(inspect.getsource(schema)).splitlines()
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :].partition("#")[2]
            above: list[str] = []
            number = node.lineno - 2
            while number >= 0 and lines[number].strip().startswith("#"):
                above.insert(0, lines[number].strip().lstrip("#"))
                number -= 1
            found[node.target.id] = one_line([*above, beside])
    return found


def with_comments(text: str, descriptions: dict[str, str]) -> str:
    """The text of a file of conf/ in which the comments of its settings are `descriptions`, by dotted names.

    A description stands at the end of the setting's line, or above it where the line would be too long. The lines that
    open the file and lines that begin with `# ---` are kept.
    """
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if not line.startswith("#")), 0)
    written = lines[:first]
    above: list[str] = []  # comments that may belong to the next setting
    groups: list[tuple[int, str]] = []  # (indentation, name) of the mappings around the current line
    for line in lines[first:]:
        if line.strip().startswith("#") and not line.strip().startswith("# ---"):
            above.append(line)
            continue
        setting = SETTING.match(line)
        name = ""
        if setting:
            groups = [group for group in groups if group[0] < len(setting[1])] + [(len(setting[1]), setting[2])]
            name = ".".join(name for _, name in groups)
        if setting and name in descriptions:
            value = setting[3].rstrip()
            beside = f"{value}  # {descriptions[name]}"
            if len(beside) <= WIDTH:
                written.append(beside if descriptions[name] else value)
            else:
                begin = f"{setting[1]}# "
                if len(written) == first:
                    written.append("")  # so that the lines that open the file end here
                written += textwrap.wrap(descriptions[name], WIDTH, initial_indent=begin, subsequent_indent=begin,
                                         break_long_words=False, break_on_hyphens=False)  # fmt: skip
                written.append(value)
        else:
            written += [*above, line]
        above = []
    return "\n".join([*written, *above]) + "\n"


def one_line(parts: list[str]) -> str:
    return " ".join(" ".join(parts).split())
