"""What older programs have recorded of a run, without the settings that have come since."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers import small_configs

from kraken_train.common.cli import compose_command
from kraken_train.common.errors import CheckpointError
from kraken_train.common.settings import setting_names, to_dict
from kraken_train.config import TrainConfig
from kraken_train.model.registry import DEFAULT_ARCHITECTURE
from kraken_train.run.recorded_settings import OF_THE_RUN, recorded_settings
from kraken_train.training.open_run import require_same_run
from kraken_train.training.resume import changed_settings

SETTINGS = [name for name in setting_names(TrainConfig) if name.partition(".")[0] not in OF_THE_RUN]


def settings_of(*arguments: str) -> dict[str, Any]:
    return to_dict(compose_command(["data_dir=data", "run_dir=run", *arguments], TrainConfig, "train"))


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    *groups, last = name.split(".")
    inner = settings
    for group in groups:
        inner = inner[group]
    del inner[last]
    return settings


@pytest.mark.parametrize(
    "choices", [(), ("schedule=wsd", "tracking=tensorboard"), ("schedule=constant",), ("optim=muon",)], ids=str
)
def test_a_setting_that_is_not_recorded_has_its_default(choices: tuple[str, ...]) -> None:
    now = settings_of(*choices)
    of_choices = ("optim", "optim.name", "schedule", "schedule.name", "tracking", "tracking.kind")
    for name in SETTINGS:
        group, _, setting = name.partition(".")
        if setting and setting not in now[group]:
            continue  # of another choice
        if not choices or name not in of_choices:  # whose default is another choice
            found = recorded_settings(without(now, name))
            assert found == now, name
            assert changed_settings(found, now) == []


def test_settings_of_another_choice_are_dropped() -> None:
    """Once every schedule had `decay_steps` and `min_ratio`."""
    for choice in ("cosine", "constant"):
        now = settings_of(f"schedule={choice}")
        older = {**now, "schedule": {"min_ratio": 0.1, "decay_steps": 1} | now["schedule"]}
        assert recorded_settings(older) == now


def test_a_change_is_still_one() -> None:
    now = settings_of()
    older = without(settings_of("optim.lr=0.5", "optim.eps=1e-7", "health.spike_factor=3"), "optim.betas")
    assert recorded_settings(older)["health"]["spike_factor"] == 3
    changes = changed_settings(recorded_settings(older), now)
    assert changes == [f"optim.lr: 0.5 -> {now['optim']['lr']}", "optim.eps: 1e-07 -> 1e-08"]
    changed = settings_of("optim.weight_decay=0.5")
    (change,) = changed_settings(recorded_settings(without(now, "optim.weight_decay")), changed)
    assert change.endswith(" -> 0.5")
    assert "None" not in change


@pytest.mark.parametrize("config", small_configs().values(), ids=small_configs().keys())
def test_the_model_of_an_older_program(config: Any) -> None:
    def identity(model: dict[str, Any]) -> dict[str, Any]:
        return {"id": "i", "model": model, "data_fingerprint": "f", "seed": 0}

    model = to_dict(config)
    for field in dataclasses.fields(config):
        is_default = model[field.name] == (DEFAULT_ARCHITECTURE if field.name == "architecture" else field.default)
        if is_default:
            require_same_run(Path("run"), identity(without(model, field.name)), identity(model))
        other = model | {field.name: 7}
        with pytest.raises(CheckpointError, match=rf"model.{field.name} is .* there and 7 here"):
            require_same_run(Path("run"), identity(without(model, field.name)), identity(other))
    with pytest.raises(CheckpointError, match=r"model.rotary is 1 there and None here"):
        require_same_run(Path("run"), identity(model | {"rotary": 1}), identity(model))
