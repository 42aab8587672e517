"""One rank's share of a model, with random weights."""

from __future__ import annotations

import torch

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.initialization import STANDARD_DEVIATION
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange
from kraken_train.parallel.weight_role import WeightRole, weight_role


@torch.no_grad()
def load_share(
    config: ModelConfig,
    communicator: Communicator,
    dtype: torch.dtype,
    device: torch.device,
    vocabulary: UnitRange | None = None,
) -> LanguageModel:
    """The part of a rank; its weights are drawn at random on the device, and take as long as trained ones.

    `vocabulary` are its rows of the vocabulary; None: all.
    """
    _, total = config.parallel_units
    with torch.device("meta"):  # the weights that it would be initialized with are not computed
        units = communicator.model_rank.unit_range(total)
        model = build_model(config, units=units, communicator=communicator, vocabulary=vocabulary)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if weight_role(model.get_submodule(name.rpartition(".")[0])) is WeightRole.NORM:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
    return model
