"""From a model's configuration to the model: the place where a further architecture is added."""

from __future__ import annotations

from kraken_train.baselines import GPTModel
from kraken_train.config import KrakenConfig, ModelConfig
from kraken_train.exchange import Exchange
from kraken_train.model import KrakenModel, LanguageModel
from kraken_train.placement import ModelRank


def build_model(
    config: ModelConfig,
    seed: int = 0,
    model_rank: ModelRank | None = None,
    exchange: Exchange | None = None,
    vocab_parallel: bool = False,
) -> LanguageModel:
    """This rank's part of the model, by default the whole of it, with initial weights drawn from `seed`.

    Over several ranks `exchange` connects them; with `vocab_parallel` the embedding and the head are cut as well.
    Raises ValueError where the ranks do not divide the model (`ParallelConfig.require_fits` says so to the user).
    """
    model_rank = model_rank or ModelRank()
    vocabulary = model_rank.place(config.vocab_size) if vocab_parallel else None
    if isinstance(config, KrakenConfig):
        return KrakenModel(config, model_rank.place(config.num_sub_layers), exchange, seed, vocabulary)
    return GPTModel(config, model_rank.place(config.num_heads), exchange, seed, vocabulary)
