"""The models of conf/model."""

from __future__ import annotations

from kraken_train.common.cli import compose_choice
from kraken_train.model.config import ModelConfig, parse_model


def conf_model(name: str, vocab_size: int | None = None) -> ModelConfig:
    """The model of conf/model/NAME.yaml; `vocab_size` is that of the data if the file has none."""
    return parse_model(compose_choice("model", name), vocab_size)
