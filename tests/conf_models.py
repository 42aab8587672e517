"""The models of conf/model."""

from __future__ import annotations

import yaml
from helpers import REPOSITORY

from kraken_train.model.config import ModelConfig, parse_model


def conf_model(name: str, vocab_size: int | None = None) -> ModelConfig:
    """The model of conf/model/NAME.yaml; `vocab_size` is that of the data if the file has none."""
    return parse_model(yaml.safe_load((REPOSITORY / "conf" / "model" / f"{name}.yaml").read_text()), vocab_size)
