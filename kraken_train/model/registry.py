"""From a model's configuration to the model: the place where a further architecture is added."""

from __future__ import annotations

from kraken_train.model.config import KrakenConfig, ModelConfig
from kraken_train.model.gpt import GPTModel
from kraken_train.model.kraken import KrakenModel
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import ModelRank, UnitRange


def build_model(
    config: ModelConfig,
    seed: int = 0,
    units: UnitRange | None = None,
    communicator: Communicator | None = None,
    vocabulary: UnitRange | None = None,
) -> LanguageModel:
    """The part of the model that has these `units`, by default all, with initial weights drawn from `seed`.

    Units are what `config.parallel_units` counts; `vocabulary` are rows of the embedding and the head. Where several
    ranks have parts, `exchange` connects them.
    """
    if isinstance(config, KrakenConfig):
        return KrakenModel(config, units, communicator, seed, vocabulary)
    return GPTModel(config, units, communicator, seed, vocabulary)


def even_share(
    config: ModelConfig, model_rank: ModelRank, vocab_parallel: bool = False
) -> tuple[UnitRange, UnitRange | None]:
    """What one of equal ranks holds: `units` and `vocabulary` of `build_model`.

    Raises ValueError where the ranks do not divide the model (`ParallelConfig.require_fits` says so to the user).
    """
    _, total = config.parallel_units
    return model_rank.place(total), model_rank.place(config.vocab_size) if vocab_parallel else None
