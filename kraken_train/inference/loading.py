"""Reads a rank's part of an exported model from the file, without the rest.

A model that N ranks could train together is served by any number of devices up to N, evenly or not, since sub-layers
and key-value heads are independent units. Where there are more devices than key-value heads, each head is held by
several of them, together with a part of the heads that it serves (`parallel.sharding.KVGroupsDim`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.exports.folder import WEIGHTS_FILE, Export
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange, sharded_dims, share_units


def share_model(config: ModelConfig, speeds: Sequence[float]) -> list[UnitRange]:
    """The units that each of the devices of these relative speeds holds: `units` of `load_part`.

    Raises ConfigError where there are more devices than a model can be shared by.
    """
    devices = len(speeds)
    name, units = config.serving_units(devices)
    if units < devices:
        raise ConfigError(f"{name}={units} cannot be shared by {devices} devices; start at most {units} ranks")
    return share_units(units, speeds)


def served_config(config: ModelConfig, units: UnitRange) -> ModelConfig:
    """The settings of the model as it is served: `units` may count copies of key-value heads."""
    return config.served_with(units.total)


def load_part(
    export: Export,
    units: UnitRange,
    communicator: Communicator,
    dtype: torch.dtype,
    device: torch.device,
    vocabulary: UnitRange | None = None,
) -> LanguageModel:
    """The part of the export's model that has these `units`, connected to the others by `communicator`, for inference.

    `vocabulary` are the rows of the embedding and the head, by default all. Reads only the part of each weight, one
    tensor at a time. Raises CheckpointError.
    """
    with torch.device("meta"):
        config = served_config(export.config, units)
        model = build_model(config, units=units, communicator=communicator, vocabulary=vocabulary)
    path = export.folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: part.to(device, dtype) for name, part in read_parts(file, model)}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again or export again") from error
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def read_parts(file: Any, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `model`, by name, out of an open safetensors file."""
    for name, sharded_dim in sharded_dims(model).items():
        weight = file.get_slice(name)
        yield name, weight[:] if sharded_dim is None else sharded_dim.read(weight)
