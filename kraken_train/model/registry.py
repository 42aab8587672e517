"""The architectures: a further one is entered here. From a configuration to the model, without importing PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.gpt_config import GPTConfig
from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.track_config import TrackConfig

if TYPE_CHECKING:
    from kraken_train.model.language_model import LanguageModel
    from kraken_train.parallel.communicator import Communicator
    from kraken_train.parallel.sharding import ModelRank, UnitRange

ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "kraken": KrakenConfig,
    "standard": GPTConfig,
    "parallel": GPTConfig,
    "ladder": LadderConfig,
    "fal": FALConfig,
    "track": TrackConfig,
}
DEFAULT_ARCHITECTURE = "kraken"  # of settings that name none


def build_model(
    config: ModelConfig,
    seed: int = 0,
    units: UnitRange | None = None,
    communicator: Communicator | None = None,
    vocabulary: UnitRange | None = None,
) -> LanguageModel:
    """The part of the model that has these `units`, by default all, with initial weights drawn from `seed`.

    Units are what `config.parallel_units` counts; `vocabulary` are rows of the embedding and the head. Where several
    ranks have parts, `communicator` connects them.
    """
    module, _, name = config.model_class.rpartition(".")
    model_class = getattr(import_module(module), name)
    return cast("LanguageModel", model_class(config, units, communicator, seed, vocabulary))


def even_share(
    config: ModelConfig, model_rank: ModelRank, vocab_parallel: bool = False
) -> tuple[UnitRange, UnitRange | None]:
    """What one of equal ranks holds: `units` and `vocabulary` of `build_model`.

    Ranks may have different numbers of rows of the vocabulary. Raises ValueError where the ranks do not divide the
    model (`ParallelConfig.require_fits` says so to the user).
    """
    _, total = config.parallel_units
    return model_rank.unit_range(total), model_rank.row_range(config.vocab_size) if vocab_parallel else None
