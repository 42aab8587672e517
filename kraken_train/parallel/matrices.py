"""The matrices of a weight, for an optimizer that treats each of them as a whole (Muon).

A weight may hold several: one for each sub-layer, and queries, keys and values where they are fused. A module whose
weight is divided in another way than its role says has a method `matrices(weight)`, which gives a view of each; the
axes of a view before the last one together are the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from kraken_train.parallel.sharding import ShardedDim
from kraken_train.parallel.weight_role import WeightRole, weight_role


@dataclass(frozen=True)
class MatrixPart:
    """What a rank holds of a matrix: the elements of `runs`, one after the other, are (rows, columns) of it."""

    runs: tuple[tuple[int, int], ...]  # (begin, length) in a flat vector, such as the weight's elements in their order
    rows: int
    columns: int
    axis: int | None  # along which the ranks of a model copy hold equal parts; None: this is the whole matrix

    def whole_shape(self, ranks: int) -> tuple[int, int]:
        """The shape of the whole matrix, given the number of ranks of a model copy."""
        return (
            self.rows * (ranks if self.axis == 0 else 1),
            self.columns * (ranks if self.axis == 1 else 1),
        )


def matrix_parts(module: nn.Module) -> list[MatrixPart]:
    """The matrices of a module's weight, or of the part that is here; none of an embedding or a norm."""
    role = weight_role(module)
    if role is None or not role.is_matrix:
        return []
    weight = torch.empty_like(cast(Tensor, module.weight), device="meta")
    declared: Any = getattr(module, "matrices", None)
    if declared is not None:
        views = declared(weight)
    else:
        views = weight.unbind() if role is WeightRole.STACKED_MATRIX else [weight]
    dim: ShardedDim | None = getattr(module, "sharded_dim", None)
    axis = None
    if dim is not None and role is WeightRole.MATRIX:
        axis = 1 if dim.axis == weight.dim() - 1 else 0
    columns = weight.shape[-1]
    return [MatrixPart(tuple(runs_of(view)), view.numel() // columns, columns, axis) for view in views]


def runs_of(view: Tensor) -> list[tuple[int, int]]:
    """(begin, length) of the contiguous runs of a view, in the order of its elements."""
    if view.is_contiguous():
        return [(int(view.storage_offset()), view.numel())]
    return [run for part in view for run in runs_of(part)]


def lay_out(weights: list[tuple[int, list[MatrixPart]]]) -> list[MatrixPart]:
    """The matrices of several weights, (number of elements, matrices) each, that stand one after the other in a vector.

    Their `runs` then count from the start of that vector.
    """
    begins = accumulate((elements for elements, _ in weights), initial=0)
    return [
        replace(part, runs=tuple((begin + first, length) for first, length in part.runs))
        for begin, (_, parts) in zip(begins, weights, strict=False)
        for part in parts
    ]
