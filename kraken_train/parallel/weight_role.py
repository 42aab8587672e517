"""What the weight of a module is: its initial values, its weight decay and its optimizer follow from it.

A module of ours with a weight says so with an attribute `weight_role`.
"""

from __future__ import annotations

from enum import Enum

from torch import nn


class WeightRole(Enum):
    MATRIX = "matrix"  # maps vectors; drawn as one tensor
    STACKED_MATRIX = "stacked matrix"  # matrices over the first axis, each drawn on its own
    EMBEDDING = "embedding"  # a row for each token or position, in an embedding or in the head; drawn as one tensor
    NORM = "norm"  # begins as ones and does not decay

    @property
    def is_matrix(self) -> bool:
        return self in (WeightRole.MATRIX, WeightRole.STACKED_MATRIX)


def weight_role(module: nn.Module) -> WeightRole | None:
    """None for a module that declares none, as one without a weight."""
    declared: WeightRole | None = getattr(module, "weight_role", None)
    if declared is not None:
        return declared
    if isinstance(module, nn.Embedding):
        return WeightRole.EMBEDDING
    return WeightRole.MATRIX if isinstance(module, nn.Linear) else None
