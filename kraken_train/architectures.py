"""From a model's configuration to the model: the place where a further architecture is added."""

from __future__ import annotations

from kraken_train.baselines import GPTModel
from kraken_train.config import KrakenConfig, ModelConfig
from kraken_train.model import KrakenModel, LanguageModel


def build_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """The whole model in this process, with initial weights drawn from `seed`."""
    if isinstance(config, KrakenConfig):
        return KrakenModel(config, seed=seed)
    return GPTModel(config, seed=seed)
