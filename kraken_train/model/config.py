"""From settings to the configuration of a model."""

from __future__ import annotations

from typing import Annotated, Any

from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import OneOf, from_dict
from kraken_train.common.validation import require_choice
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.gpt_config import GPTConfig
from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.registry import ARCHITECTURES, DEFAULT_ARCHITECTURE

__all__ = ["GPTConfig", "KrakenConfig", "ModelConfig", "ModelSettings", "padded_vocab_size", "parse_model"]

ModelSettings = Annotated[dict[str, Any], OneOf(tuple(dict.fromkeys(ARCHITECTURES.values())))]  # for `parse_model`


def parse_model(settings: dict[str, Any], data_vocab_size: int | None = None) -> ModelConfig:
    """A `conf/model` group as a configuration object.

    `vocab_size: null` stands for the data's vocabulary, rounded up to a multiple of 64. Raises ConfigError for an
    unknown architecture or setting, and for a vocabulary that does not fit the data's.
    """
    if not isinstance(settings, dict):
        raise ConfigError(f"model={settings} must be a group of settings")
    settings = dict(settings)
    architecture = settings.get("architecture", DEFAULT_ARCHITECTURE)
    require_choice("model.architecture", architecture, tuple(ARCHITECTURES))
    if data_vocab_size is not None:
        if settings.get("vocab_size") is None:
            settings["vocab_size"] = padded_vocab_size(data_vocab_size)
        require_fitting_vocabulary(settings["vocab_size"], data_vocab_size)
    return from_dict(settings, ARCHITECTURES[architecture], prefix="model")


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 64, the row count that matrix units like (GPT-2's 50257 becomes 50304)."""
    return -(-vocab_size // 64) * 64


def require_fitting_vocabulary(model_vocab_size: object, data_vocab_size: int) -> None:
    """The model's embedding has a row for each token of the data, and less than 1024 rows more (padding)."""
    if not isinstance(model_vocab_size, int) or not data_vocab_size <= model_vocab_size < data_vocab_size + 1024:
        raise ConfigError(
            f"model.vocab_size={model_vocab_size} does not fit the data, whose tokenizer has {data_vocab_size} "
            f"tokens; use {data_vocab_size}, {padded_vocab_size(data_vocab_size)} (padded to a multiple of 64), or "
            "null to take it from the data"
        )
