"""What the weight of a module is: its initial values and its weight decay follow from it.

A module of ours with a weight says so with an attribute `weight_role`.
"""

from __future__ import annotations

from enum import Enum

from torch import nn


class WeightRole(Enum):
    MATRIX = "matrix"  # also an embedding; drawn as one tensor
    STACKED_MATRIX = "stacked matrix"  # matrices over the first axis, each drawn on its own
    NORM = "norm"  # begins as ones and does not decay


def weight_role(module: nn.Module) -> WeightRole | None:
    """None for a module that declares none, as one without a weight."""
    declared: WeightRole | None = getattr(module, "weight_role", None)
    if declared is not None:
        return declared
    return WeightRole.MATRIX if isinstance(module, nn.Linear | nn.Embedding) else None
