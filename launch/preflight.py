"""Checks of a training run that one process can make before its ranks start."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from checkpoints.exports.initial import open_initial_export
from kraken_train.common.cli import compose_command
from kraken_train.config import TrainConfig
from kraken_train.data.phases import RunData
from kraken_train.data.validation_set import validation_sets
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.training.open_run import check_run_folder
from kraken_train.training.teacher import open_teacher

PLACEHOLDER_VOCAB_SIZE = 64  # used while the data, which determine the vocabulary size, do not exist


def train_config(overrides: Sequence[str]) -> TrainConfig:
    """The settings that `kraken_train.train` would read from these arguments. Raises ConfigError."""
    return compose_command(overrides, TrainConfig, "train")


def check_training(config: TrainConfig, ranks: int, future_data: Collection[Path] = ()) -> ModelConfig:
    """Check that a run can start with so many ranks, as far as one process can tell; its model.

    `future_data` are data folders that an earlier job will write. Neither their content nor what depends on it is
    checked. Raises ConfigError, DataError or CheckpointError.
    """
    config.gradient_accumulation_steps(config.parallel.data_parallel_size(ranks))
    future = {folder.resolve() for folder in future_data}
    if any(folder.resolve() in future for folder in config.data_folders):
        has_vocab_size = config.model.get("vocab_size") is not None
        model = parse_model(config.model, None if has_vocab_size else PLACEHOLDER_VOCAB_SIZE)
        config.require_fits(model)
        return model
    data = RunData(config.data_phases)
    model = parse_model(config.model, data.first.vocab_size)
    config.require_fits(model)
    validation_sets(data.first, config.validation.folders, config.validation.samples, data.later_manifests)
    check_run_folder(config, model, data.fingerprints, open_teacher(config, model, data.first.tokenizer_files))
    if config.init_from is not None:
        open_initial_export(Path(config.init_from), model, data.first.tokenizer_files)
    return model
