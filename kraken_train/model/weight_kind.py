"""What a weight does in a model: which rule of a parametrization holds for it (`kraken_train.recipe.parametrization`).

A module says so with an attribute `weight_kind`, unless its type or name tells it: see `initialization.weight_kind`.
"""

from __future__ import annotations

from enum import Enum


class WeightKind(Enum):
    EMBEDDING = "embedding"  # rows, one for each token or position; the head too, tied or not
    EMBEDDING_MAP = "embedding map"  # from an embedding of another width; its initial values follow that width
    HIDDEN = "hidden"  # a matrix between activations whose number grows with the width
    RESIDUAL = "residual"  # the last matrix of a branch, which adds to a residual stream
    CONJUNCTION = "conjunction"  # the matrices that make one stream of all, before the final norm
    NORM = "norm"  # the gain of a norm
    FINAL_NORM = "final norm"  # the gain of the norm before the head
