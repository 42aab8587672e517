"""What can be known of a training run before its ranks start, found out by one process."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from checkpoints.exports.initial import open_initial_export
from kraken_train.common.cli import compose_command
from kraken_train.config import TrainConfig
from kraken_train.data.dataset import TrainingData
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.training.open_run import check_run_folder

ANY_VOCABULARY = 64  # tokens, where the data do not exist yet


def train_config(overrides: Sequence[str]) -> TrainConfig:
    """What `kraken_train.train` makes of these arguments. Raises ConfigError."""
    return compose_command(overrides, TrainConfig, "train")


def check_training(config: TrainConfig, ranks: int, coming: Collection[Path] = ()) -> ModelConfig:
    """The model of a run that can start with so many ranks, as far as one process can tell.

    `coming` are data folders that will have been written by then: what is in them is not checked, nor what depends on
    it. Raises ConfigError, DataError or CheckpointError.
    """
    config.gradient_accumulation_steps(config.parallel.data_parallel_size(ranks))
    expected = {folder.resolve() for folder in coming}
    if any(folder.resolve() in expected for folder in config.data_shares):
        known = config.model.get("vocab_size") is not None
        model = parse_model(config.model, None if known else ANY_VOCABULARY)
        config.parallel.require_fits(model)
        return model
    data = TrainingData(config.data_shares)
    model = parse_model(config.model, data.vocab_size)
    config.parallel.require_fits(model)
    check_run_folder(config, model, data.fingerprint)
    if config.init_from is not None:
        open_initial_export(Path(config.init_from), model, data.tokenizer_files)
    return model
