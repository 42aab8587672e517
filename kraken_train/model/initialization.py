"""Initial weights that depend on the run's seed and a weight's global identity, never on the rank that holds it.

normal(0, 0.02); projections that add to a residual stream normal(0, 0.02 / sqrt(2 depth)), depth being L N for
Kraken (as in the authors' code) and L for the baselines; norms 1. A module with an `initial_std` has that instead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from kraken_train.model.weight_kind import WeightKind
from kraken_train.parallel.sharding import ShardedDim
from kraken_train.parallel.weight_role import WeightRole, weight_role

STANDARD_DEVIATION = 0.02
RESIDUAL_PROJECTIONS = ("attention.out", "ffn.down")


@torch.no_grad()
def initialize(model: nn.Module, seed: int, residual_depth: int) -> None:
    """Fill all parameters in place.

    Each tensor, and of a stacked one each sub-layer's slice, has a random stream of its own, seeded by (seed,
    name, global sub-layer id): ranks that hold other slices draw the same model. Raises TypeError for a module with
    parameters that has no role.
    """
    for name, module in model.named_modules():
        std = getattr(module, "initial_std", STANDARD_DEVIATION)
        if name.endswith(RESIDUAL_PROJECTIONS):
            std /= math.sqrt(2 * residual_depth)
        role = weight_role(module)
        if role is not None:
            fill(cast(Tensor, module.weight), role, getattr(module, "sharded_dim", None), std, f"{seed}/{name}.weight")
        elif any(True for _ in module.parameters(recurse=False)):
            raise TypeError(f"{name} ({type(module).__name__}) has parameters but no rule for their initial values")


@torch.no_grad()
def scale_initial_weights(model: nn.Module, factor: Callable[[WeightKind], float]) -> None:
    """Multiply all parameters in place with the factor of their kind."""
    for name, module in model.named_modules():
        if (kind := weight_kind(name, module)) is not None:
            cast(Tensor, module.weight).mul_(factor(kind))


def weight_kind(name: str, module: nn.Module) -> WeightKind | None:
    """None for a module without a weight of its own. A matrix that says nothing is between hidden activations."""
    declared: WeightKind | None = getattr(module, "weight_kind", None)
    role = weight_role(module)
    if declared is not None or role is None:
        return declared
    if role is WeightRole.NORM:
        return WeightKind.NORM
    if role is WeightRole.EMBEDDING:
        return WeightKind.EMBEDDING
    return WeightKind.RESIDUAL if name.endswith(RESIDUAL_PROJECTIONS) else WeightKind.HIDDEN


def fill(weight: Tensor, role: WeightRole, sharded_dim: ShardedDim | None, std: float, identity: str) -> None:
    """Fill the part of a weight that is here."""
    if role is WeightRole.NORM:
        weight.fill_(1.0)
    elif sharded_dim is None:
        weight.copy_(draw_normal(weight.shape, std, identity))
    elif role is WeightRole.STACKED_MATRIX:
        for slice_, unit in zip(weight, sharded_dim.units.ids, strict=True):
            slice_.copy_(draw_normal(slice_.shape, std, f"{identity}/{unit}"))
    else:
        weight.copy_(sharded_dim.take(draw_normal(sharded_dim.whole_shape(weight.shape), std, identity)))


def draw_normal(shape: torch.Size, std: float, identity: str) -> Tensor:
    digest = hashlib.sha256(identity.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    # Drawn on the CPU in fp32, so that the model's device and dtype have no influence.
    return torch.empty(shape).normal_(0.0, std, generator=generator)
