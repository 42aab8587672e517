"""Which models of a comparison fit into memory at the same time, decided before any of them runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kraken_train.bench.timing import Conditions, variants_of
from kraken_train.common.errors import ConfigError
from kraken_train.inference.memory import free_memory, serving_memory
from kraken_train.model.architecture import ModelConfig
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import ModelRank

MARGIN = 0.15  # of the memory stays free, for graphs and fragmentation
DEEPEST_SCALED = 12  # layers; more would not change what a layer takes


@dataclass(frozen=True)
class Plan:
    """How one comparison is run."""

    groups: tuple[tuple[str, ...], ...]  # architectures that are in memory together
    depths: tuple[int] | tuple[int, int]  # the model's own number of layers, or two smaller ones to extrapolate from


def make_plan(models: Mapping[str, ModelConfig], degree: int, conditions: Conditions, usable: int) -> Plan:
    """The most that fits into `usable` bytes: all models together, each on its own, or two smaller depths of all.

    Only on a GPU are depths scaled, and only to multiples of what repeats in all models. Raises ConfigError where
    nothing fits.
    """
    num_layers = next(iter(models.values())).num_layers
    needs = [bytes_by_depth(config, degree, conditions) for config in models.values()]
    together = [sum(need(depth) for need in needs) for depth in range(num_layers + 1)]
    if together[-1] <= usable:
        return Plan((tuple(models),), (num_layers,))
    largest = max(need(num_layers) for need in needs)
    if largest <= usable:
        return Plan(tuple((name,) for name in models), (num_layers,))
    period = math.lcm(*(config.layer_period for config in models.values()))
    deepest = min(max(DEEPEST_SCALED, 2 * period), num_layers - 1)
    fitting = [depth for depth in range(2 * period, deepest + 1, period) if together[depth] <= usable]
    if conditions.device.type != "cuda" or not fitting:
        raise ConfigError(
            f"the share of one of {degree} devices takes {largest / 1e9:.1f} GB, and {conditions.device.type} has "
            f"{usable / 1e9:.1f} GB for it; use smaller sizes (sizes=[tiny] fits everywhere) or more degrees"
        )
    return Plan((tuple(models),), (period * max(1, fitting[-1] // (3 * period)), fitting[-1]))


def bytes_by_depth(config: ModelConfig, degree: int, conditions: Conditions) -> Callable[[int], int]:
    """Number of layers -> memory of one rank's share, with an engine for each variant."""
    _, units = config.parallel_units

    def need(depth: int) -> int:
        memory = serving_memory(
            config.at_depth(depth),
            ModelRank(0, degree).unit_range(units),
            conditions.batch_size,
            conditions.capacity,
            conditions.dtype,
        )
        return memory.weights + len(variants_of(config)) * (memory.cache + memory.activations)

    one, two = need(1), need(2)
    return lambda depth: one + (depth - 1) * (two - one)


def usable_bytes(device: torch.device, runtime: Runtime) -> int:
    """Memory for a rank's share: the least over all ranks."""
    return int(min(runtime.gather(free_memory(device, runtime.local_world_size))) * (1 - MARGIN))
