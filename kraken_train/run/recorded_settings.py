"""Settings that a run has recorded, maybe by an older program: one that is not in the record has today's default."""

from __future__ import annotations

import functools
from typing import Any

from kraken_train.common.cli import CONF_DIR, compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import choices_of, field_types, to_dict
from kraken_train.config import TrainConfig
from kraken_train.model.registry import ARCHITECTURES, DEFAULT_ARCHITECTURE

OF_THE_RUN = ("model", "data_dir", "run_dir")  # these have no default
CHOICES = {
    "optim": "name",
    "schedule": "name",
    "tracking": "kind",
}  # the setting that names the file in conf/ of a group


def recorded_settings(recorded: dict[str, Any]) -> dict[str, Any]:
    """`recorded`, the settings of a TrainConfig, with the defaults of conf/ for those that it lacks.

    Raises ConfigError where a group of settings is none.
    """
    defaults = defaults_with()
    for name, default in defaults.items():
        if isinstance(default, dict) and not isinstance(recorded.get(name, {}), dict):
            raise ConfigError(f"the recorded settings have {name}={recorded[name]}, which must be a group of settings")
    chosen = {group: recorded.get(group, {}).get(setting) for group, setting in CHOICES.items()}
    for group, name in chosen.items():
        if not isinstance(name, str | None):
            raise ConfigError(f"the recorded settings have {group}.{CHOICES[group]}={name}, which must be a name")
    files = [f"{group}={name}" for group, name in chosen.items() if name in choices_in(group)]
    settings = filled(defaults_with(*files), recorded)
    # Older programs recorded the settings of all choices of a group, and used those of the chosen one.
    for group, kind in field_types(TrainConfig).items():
        choices = choices_of(kind)
        if choices and (schema := choices.get(settings[group].get("name"))):
            known = field_types(schema)
            settings[group] = {key: value for key, value in settings[group].items() if key in known}
    return settings


def choices_in(group: str) -> list[str]:
    """The names of a group's files in conf/."""
    return [file.stem for file in (CONF_DIR / group).glob("*.yaml")]


@functools.cache
def defaults_with(*choices: str) -> dict[str, Any]:
    """The settings of conf/ with these choices of groups."""
    defaults = to_dict(compose_command(["data_dir=DATA", "run_dir=RUN", *choices], TrainConfig, "train"))
    return {key: value for key, value in defaults.items() if key not in OF_THE_RUN}


def recorded_model(recorded: dict[str, Any]) -> dict[str, Any]:
    """The same for the settings of a model, whose defaults its class has. Raises ConfigError."""
    architecture = recorded.get("architecture", DEFAULT_ARCHITECTURE)
    if not isinstance(architecture, str):
        raise ConfigError(f"the recorded model has architecture={architecture}, which must be a name")
    schema = ARCHITECTURES.get(architecture)
    return filled({} if schema is None else schema.defaults(), recorded)


def filled(defaults: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """`recorded` and what only `defaults` has, in groups of settings as well."""
    return defaults | {
        key: filled(defaults[key], value) if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in recorded.items()
    }
