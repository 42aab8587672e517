"""A rank's part of an exported model, read from the file without the rest.

A model that N ranks could train together is served by any number of devices up to N, evenly or not, since sub-layers
and key-value heads are independent units. Where there are more devices than key-value heads, each head is held by
several of them, together with a part of the heads that it serves.

Shapes: G key-value heads, each for H / G heads, K head dimension, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.exports.folder import WEIGHTS_FILE, Export
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.model.config import GPTConfig, ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange, sharded_dims, share_units


def share_model(config: ModelConfig, speeds: Sequence[float]) -> list[UnitRange]:
    """What each of the devices of these relative speeds holds: `units` of `load_part`.

    Raises ConfigError where there are more devices than a model can be shared by.
    """
    devices = len(speeds)
    name, units = config.parallel_units
    if isinstance(config, GPTConfig) and units < devices:
        name, units = "model.num_heads", least_copies(config, devices) * units
    if units < devices:
        raise ConfigError(f"{name}={units} cannot be shared by {devices} devices; start at most {units} ranks")
    return share_units(units, speeds)


def least_copies(config: GPTConfig, devices: int) -> int:
    """Of each key-value head, so that every device has one; at most as many as it serves heads."""
    heads_per_group = config.num_heads // config.kv_heads
    enough = (r for r in range(1, heads_per_group) if heads_per_group % r == 0 and r * config.kv_heads >= devices)
    return next(enough, heads_per_group)


def served_config(config: ModelConfig, units: UnitRange) -> ModelConfig:
    """The settings of the model as it is served: `units` may count copies of key-value heads."""
    if isinstance(config, GPTConfig) and units.total != config.kv_heads:
        return dataclasses.replace(config, num_kv_heads=units.total)
    return config


def load_part(
    export: Export, units: UnitRange, communicator: Communicator, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """The part of the export's model that has these `units`, connected to the others by `exchange`, for inference.

    Of the weights only the part is read, one tensor at a time. Raises CheckpointError.
    """
    with torch.device("meta"):
        model = build_model(served_config(export.config, units), units=units, communicator=communicator)
    path = export.folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: part.to(device, dtype) for name, part in read_parts(file, model, export.config)}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again or export again") from error
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def read_parts(file: Any, model: LanguageModel, stored: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `model`, by name, out of an open safetensors file with those of `stored`."""
    for name, sharded_dim in sharded_dims(model).items():
        weight = file.get_slice(name)
        if sharded_dim is None:
            yield name, weight[:]
            continue
        units = sharded_dim.units
        if isinstance(stored, GPTConfig) and name.endswith("attention.qkv.weight"):
            copies = units.total // stored.kv_heads
            yield name, torch.stack([read_group(weight, unit, copies, stored) for unit in units.ids])
        else:
            here = slice(units.first, units.first + units.count)
            yield name, weight[(slice(None),) * sharded_dim.axis + (here,)]


def read_group(weight: Any, unit: int, copies: int, stored: GPTConfig) -> Tensor:
    """Of a `QKVLinear` weight (G, (H / G + 2) K, D): a key-value head with its heads, or a copy with some of them.

    The `copies` of a key-value head are adjacent units and have H / G / copies heads each.
    """
    group, number = divmod(unit, copies)
    all_queries = stored.num_heads // stored.kv_heads * stored.head_dim
    queries = all_queries // copies
    parts = [weight[group, number * queries : (number + 1) * queries], weight[group, all_queries:]]
    return torch.cat(parts)
