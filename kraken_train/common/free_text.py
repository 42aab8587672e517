"""Settings of free text: their values reach the program as typed, and not as Hydra's grammar reads them.

That grammar reads a comma as a sweep, `(` as a function, `#` and `%` as errors, and `007` as a number. A
dataclass says with the type of a setting that it is free text; `quote_arguments` quotes it for Hydra.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from kraken_train.common.settings import escape_interpolations

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)  # a whole string of Hydra's grammar
LIST_ITEM = re.compile(rf"\s*({QUOTED.pattern}|[^,]*?)\s*(?:,|\Z)", re.DOTALL)
MAPPING = re.compile(r"\{.*:.*\}", re.DOTALL)


@dataclass(frozen=True)
class FreeText:
    """The mark of such a setting's type."""

    is_path: bool = False  # `~` is expanded, which not every shell does after `=`
    may_be_quoted: bool = False  # what Hydra reads as one quoted string is what stands between the quotes


Text = Annotated[str, FreeText()]
FilePath = Annotated[str, FreeText(is_path=True)]
Name = Annotated[str, FreeText(may_be_quoted=True)]


@dataclass(frozen=True)
class Setting:
    mark: FreeText
    is_list: bool
    may_be_mapping: bool


def free_text_settings(schema: type, prefix: str = "") -> dict[str, Setting]:
    """Those of a dataclass, nested ones included, by their dotted names."""
    found: dict[str, Setting] = {}
    for name, kind in get_type_hints(schema, include_extras=True).items():
        choices = [kind, *get_args(kind)]  # of a union
        if dataclasses.is_dataclass(kind):
            found |= free_text_settings(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif (mark := mark_of(kind)) is not None:
            is_list, may_be_mapping = (any(get_origin(choice) is of for choice in choices) for of in (tuple, dict))
            found[prefix + name] = Setting(mark, is_list, may_be_mapping)
    return found


def mark_of(kind: Any) -> FreeText | None:
    if get_origin(kind) is Annotated:
        return next((mark for mark in kind.__metadata__ if isinstance(mark, FreeText)), None)
    return next((mark for part in get_args(kind) if (mark := mark_of(part)) is not None), None)


def quote_arguments(arguments: Iterable[str], schema: type) -> list[str]:
    """Arguments of a command with these settings as Hydra's grammar needs them."""
    settings = free_text_settings(schema)
    return [quote_argument(argument, settings) for argument in arguments]


def quote_argument(argument: str, settings: dict[str, Setting]) -> str:
    """`prompt=Hello, world` -> `prompt='Hello, world'`; what is no free text is unchanged.

    `null` keeps its meaning, and so do `{FOLDER: WEIGHT, ...}` and lists where a setting may be one.
    """
    key, separator, value = argument.partition("=")
    setting = settings.get(key.lstrip("+"))
    if not separator or setting is None or value == "null" or (setting.may_be_mapping and MAPPING.fullmatch(value)):
        return argument
    if not setting.is_list:
        return f"{key}={quote(value, setting.mark)}"
    if not (value.startswith("[") and value.endswith("]")):
        return argument
    items = [match[1] for match in LIST_ITEM.finditer(value[1:-1]) if match[0]]
    return f"{key}=[{','.join(quote(item, setting.mark) for item in items)}]"


def quote(value: str, mark: FreeText) -> str:
    """A string of Hydra's grammar that means `value`."""
    if mark.may_be_quoted and QUOTED.fullmatch(value):
        return value
    if mark.is_path and value.startswith("~"):
        value = os.path.expanduser(value)
    # In Hydra's quoted strings backslashes are special only before a quote and at the end.
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escape_interpolations(value))
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"'{escaped}'"
