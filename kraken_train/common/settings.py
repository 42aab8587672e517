"""From YAML and the command line to frozen dataclasses: the only file that knows OmegaConf and Hydra's errors."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_choice, suggestion

Schema = TypeVar("Schema")
SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True)
class OneOf:
    """Marks the type of a group of settings that one of several dataclasses describes."""

    schemas: tuple[type, ...]


COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)


def from_hydra(composed: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as a validated object of `schema`. Raises ConfigError."""
    try:
        settings = to_plain(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(describe_composition_error(error)) from error
    return from_dict(settings, schema)


def to_plain(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain dictionaries and lists. Raises OmegaConfBaseException for a missing value."""
    settings = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in dict(settings).items()}  # type: ignore[arg-type]


def from_dict(settings: dict[str, Any], schema: type[Schema], prefix: str = "") -> Schema:
    """`settings` as a validated object of the dataclass `schema`; unknown keys are refused. Raises ConfigError.

    `schema` and the types of its fields may also be unions of dataclasses that `name` chooses from (`choices_of`).
    """
    dot = f"{prefix}." if prefix else ""
    if choices := choices_of(schema):
        chosen, settings = choose(settings, choices, prefix)
        return from_dict(settings, chosen, prefix)
    refuse_unknown(settings, schema, dot)
    for key, kind in field_types(schema).items():
        if choices_of(kind) and isinstance(settings.get(key), dict):
            settings = {**settings, key: from_dict(settings[key], kind, dot + key)}
        elif (item := item_schema(kind)) and settings.get(key) is not None:
            settings = {**settings, key: from_list(settings[key], item, dot + key)}
    try:
        parsed = TypeAdapter(schema).validate_python(settings)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, dot)) from None
    if hasattr(parsed, "validate"):
        parsed.validate()
    return parsed


def choices_of(kind: Any) -> dict[str, type]:
    """The dataclasses of a union, by their literal `name`; empty if `kind` is no such union."""
    parts = [part for part in get_args(kind) if dataclasses.is_dataclass(part)]
    if len(parts) < 2:
        return {}
    return {get_args(get_type_hints(part)["name"])[0]: part for part in parts}  # type: ignore[misc]


def item_schema(kind: Any) -> type | None:
    """The dataclass of the items, where the type of a setting is a tuple of such, or that or null."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is tuple and dataclasses.is_dataclass(get_args(part)[0]):
            return get_args(part)[0]  # type: ignore[no-any-return]
    return None


def from_list(items: Any, schema: type[Schema], name: str) -> list[Schema]:
    """Groups of settings as `from_dict` reads each; `name[0]` is the first. Raises ConfigError."""
    keys = ", ".join(f"{key}: ..." for key in field_types(schema))
    if not isinstance(items, list):
        raise ConfigError(f"{name}={items} must be a list of groups of settings, as in [{{{keys}}}]")
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise ConfigError(f"{name}[{number}]={item} must be a group of settings, as in {{{keys}}}")
    return [from_dict(item, schema, f"{name}[{number}]") for number, item in enumerate(items)]


def choose(settings: dict[str, Any], choices: dict[str, type], group: str) -> tuple[type, dict[str, Any]]:
    """The dataclass that the settings of `group` choose by their `name`, and the settings without those of others.

    `GROUP.name=NAME` alone leaves the settings of the file that was chosen before, which mean nothing for NAME. Raises
    ConfigError if a setting of NAME is missing.
    """
    name = settings.get("name")
    require_choice(f"{group}.name", str(name), tuple(choices))
    chosen = choices[str(name)]
    for field in dataclasses.fields(chosen):
        if field.name not in settings and field.default is dataclasses.MISSING:
            raise ConfigError(f"{group}.name={name} needs {group}.{field.name}; choose it with {group}={name}")
    others = {key for other in choices.values() for key in field_types(other)} - set(field_types(chosen))
    return chosen, {key: value for key, value in settings.items() if key not in others}


def refuse_unknown(settings: dict[str, Any], schema: type, dot: str) -> None:
    kinds = field_types(schema)
    for key, value in settings.items():
        if key not in kinds:
            known = ", ".join(dot + name for name in kinds)
            raise ConfigError(f"{dot}{key} is not a setting{suggestion(key, tuple(kinds))}; known: {known}")
        if dataclasses.is_dataclass(kinds[key]) and isinstance(value, dict):
            refuse_unknown(value, kinds[key], f"{dot}{key}.")
        elif isinstance(value, bool) and kinds[key] in (int, float, int | None, float | None):
            raise ConfigError(f"{dot}{key}={str(value).lower()} must be a number")


def field_types(schema: type, include_extras: bool = False) -> dict[str, Any]:
    """The type of each field of a dataclass; class variables are no fields."""
    hints = get_type_hints(schema, include_extras=include_extras)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def describe_validation_error(error: ValidationError, dot: str) -> str:
    """One line for the first thing that pydantic found wrong."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if location[-1].isdigit():
        return f"{dot}{'.'.join(location[:-1])}: value {int(location[-1]) + 1}: {first['msg'].lower()}"
    name = dot + ".".join(location)
    if first["type"] == "missing":
        return f"{name} is not set; give {name}=VALUE"
    if first["type"] == "dataclass_type":
        return f"{name} is a group of settings; set them one by one, as in {name}.KEY=VALUE"
    given = "null" if first["input"] is None else textwrap.shorten(str(first["input"]), SHOWN, placeholder="...")
    message = first["msg"].removeprefix("Value error, ")  # of the type's own validator
    return f"{name}={given}: {message[:1].lower()}{message[1:]}"


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration object as the plain values of YAML and JSON, the inverse of `from_dict`."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def escape_interpolations(text: str) -> str:
    """Text that OmegaConf reads back as it stands, although `${` opens an interpolation there."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def setting_names(schema: type, prefix: str = "") -> tuple[str, ...]:
    """Dotted names of all settings of a dataclass, those of nested dataclasses and of each of `OneOf` included."""
    names: list[str] = []
    for name, kind in field_types(schema, include_extras=True).items():
        names.append(prefix + name)
        marks = kind.__metadata__ if get_origin(kind) is Annotated else ()
        nested = [schema for mark in marks if isinstance(mark, OneOf) for schema in mark.schemas]
        nested += choices_of(kind).values()
        for inner in [kind] if dataclasses.is_dataclass(kind) else nested:
            names += setting_names(inner, f"{prefix}{name}.")  # type: ignore[arg-type]
    return tuple(dict.fromkeys(names))


def describe_unchosen(key: str, schema: type) -> str:
    """One line about a setting that the chosen file of its group does not have: which ones do, and what others have."""
    group, _, name = key.partition(".")
    fields = {choice: field_types(kind) for choice, kind in choices_of(field_types(schema).get(group)).items()}
    having = [f"{group}={choice}" for choice, kinds in fields.items() if name in kinds]
    others = [
        f"{group}={choice} has {', '.join(f'{group}.{kind}' for kind in kinds if kind != 'name')}"
        for choice, kinds in fields.items()
        if name not in kinds
    ]
    belongs = f"it belongs to {' and '.join(having) or f'another choice of {group}'}"
    return "; ".join([f"{key} is not a setting of the chosen {group}", belongs, *others])


def describe_composition_error(error: Exception, schema: type | None = None) -> str:
    """One line for what Hydra or OmegaConf refused: the key, its value and what would work.

    `schema` has all settings.
    """
    text, known = str(error), () if schema is None else setting_names(schema)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown and "To append to your config" in text:
        key = unknown.group(1)
        if key in known and schema is not None:
            return describe_unchosen(key, schema)
        return f"{key} is not a setting{suggestion(key, known)}; see --help for all"
    unreadable = getattr(error, "override", None)  # of Hydra's OverrideParseException
    if unreadable is not None:
        return f"{unreadable} cannot be read as key=value; put quotes around a value with special characters"
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        available = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        name, _, choice = group.group(1).rpartition("/")
        if available:
            close = suggestion(choice, tuple(available))
            return f"{name}={choice} is not known; use one of {', '.join(available)}{close}"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)} is not set; give {missing.group(1)}=VALUE"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key_line = next((line for line in lines if line.startswith("full_key:")), "")
    message = lines[0] if lines else type(error).__name__
    return f"{key_line.removeprefix('full_key:').strip()}: {message}" if key_line else message
