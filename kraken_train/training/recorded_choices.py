"""Settings that the user leaves to the program: a run that is continued keeps what it has recorded for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from checkpoints.training.manifest import has_checkpoints
from checkpoints.training.store import find_good_checkpoint
from kraken_train.common.errors import CheckpointError
from kraken_train.config import AUTO, TrainConfig
from kraken_train.run.layout import CONFIG_FILE, IDENTITY_FILE


@dataclass(frozen=True)
class RecordedChoices:
    """Of the run in a folder. None: there is no run, or it left the setting to the program too."""

    precision: str | None = None
    compile: bool | None = None
    vocab_parallel: bool | None = None

    def fill(self, config: TrainConfig) -> TrainConfig:
        """The settings with the recorded ones where `config` has null. `choose_precision` takes the precision."""
        engine, parallel = config.engine, config.parallel
        if engine.compile is None:
            engine = replace(engine, compile=self.compile)
        if parallel.vocab_parallel is None:
            parallel = replace(parallel, vocab_parallel=self.vocab_parallel)
        return replace(config, engine=engine, parallel=parallel)


def leaves_choices(config: TrainConfig) -> bool:
    """Whether a setting of `RecordedChoices` is left to the program."""
    return config.precision == AUTO or config.engine.compile is None or config.parallel.vocab_parallel is None


def recorded_choices(path: Path) -> RecordedChoices:
    """Of the run in this folder, by its latest start or else its newest good checkpoint. Raises CheckpointError."""
    file, checkpoints = path / CONFIG_FILE, path / "checkpoints"
    if (path / IDENTITY_FILE).is_file() and file.is_file():
        try:
            return choices_of_run(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{file} is damaged; restore the file, or give precision=bf16 or fp32, engine.compile=true or false "
                "and parallel.vocab_parallel=true or false"
            ) from error
    if not has_checkpoints(checkpoints):
        return RecordedChoices()
    return choices_of_run(find_good_checkpoint(checkpoints)[0].metadata["config"])


def choices_of_run(recorded: dict[str, Any]) -> RecordedChoices:
    """`recorded`: the settings of a TrainConfig, maybe by an older program that lacked some."""
    return RecordedChoices(
        str(recorded["precision"]),
        recorded.get("engine", {}).get("compile"),
        recorded.get("parallel", {}).get("vocab_parallel"),
    )
