"""What trackers show of a run beside its metrics, read from the run folder. Imports no torch, which loads slowly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import read_file
from kraken_train.common.parsing import parse_mapping, parse_yaml
from kraken_train.common.settings import from_dict
from kraken_train.model.config import parse_model
from kraken_train.run.layout import CONFIG_FILE, IDENTITY_FILE, start_folders
from kraken_train.run.recorded_settings import recorded_settings
from kraken_train.settings.tracking import TrackingConfig

ENVIRONMENT_FILE = "environment.json"  # in the folder of a start


@dataclass(frozen=True)
class RunInfo:
    path: Path
    run_id: str
    tracking: TrackingConfig
    settings: dict[str, Any]  # resolved, those of the latest start
    facts: dict[str, Any]  # model, num_parameters, data_fingerprint, environment: versions, commit, hosts

    @property
    def name(self) -> str:
        return self.tracking.name or self.path.resolve().name


def read_run_info(path: Path) -> RunInfo:
    """The run in the folder `path`. Raises CheckpointError if there is none, ConfigError for its settings."""
    try:
        identity = parse_mapping(read_file(path / IDENTITY_FILE))
        settings = parse_yaml(read_file(path / CONFIG_FILE))
        run_id, model, tracking = identity["id"], identity["model"], recorded_settings(settings)["tracking"]
        facts = {
            "model": model,
            "num_parameters": parse_model(model, model["vocab_size"]).num_parameters,
            "data_fingerprint": identity["data_fingerprint"],
        }
        environments = [start / ENVIRONMENT_FILE for start in start_folders(path)]
        for file in [file for file in environments if file.is_file()][-1:]:
            facts["environment"] = parse_mapping(read_file(file))
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the folder of a run ({error}); name the run_dir of a training run that has "
            "begun its first step"
        ) from error
    return RunInfo(path, run_id, from_dict(tracking, TrackingConfig, "tracking"), settings, facts)
