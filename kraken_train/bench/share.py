"""One rank's share of a model, with random weights."""

from __future__ import annotations

import torch

from kraken_train.model.config import ModelConfig
from kraken_train.model.initialization import STANDARD_DEVIATION
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from kraken_train.parallel.communicator import Communicator


@torch.no_grad()
def load_share(
    config: ModelConfig, communicator: Communicator, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """What a rank of the exchange holds; random weights, drawn on the device, take as long as trained ones."""
    _, total = config.parallel_units
    with torch.device("meta"):  # the weights that it would be initialized with are not computed
        model = build_model(config, units=communicator.model_rank.place(total), communicator=communicator)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
    return model
