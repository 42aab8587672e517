"""The fused kernels as the model calls them. Importing this file imports Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kraken_train.kernels.activation import ActivatedProduct
from kraken_train.kernels.ffn_entry import ffn_entry
from kraken_train.kernels.heads import SplitHeads
from kraken_train.kernels.layer_entry import layer_entry


class FusedKernels:
    """The functions of `twins`, which say what they compute, as kernels."""

    @staticmethod
    def layer_entry(
        x: Tensor, added: Tensor, gain: Tensor, epsilon: float, center: bool, sum_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, total, normed, _, _ = layer_entry(x, added, gain, epsilon, center, sum_dtype)
        return y, total, normed

    @staticmethod
    def ffn_entry(
        x: Tensor, attended: Tensor, total: Tensor, gain: Tensor, epsilon: float, center: bool, reads_stream: bool
    ) -> tuple[Tensor, Tensor]:
        residual, normed, _, _ = ffn_entry(x, attended, total, gain, epsilon, center, reads_stream)
        return residual, normed

    @staticmethod
    def activated_product(gate: Tensor | None, up: Tensor, weight: Tensor) -> Tensor:
        function: Any = ActivatedProduct  # PyTorch gives `apply` no types
        result: Tensor = function.apply(gate, up, weight)
        return result

    @staticmethod
    def split_heads(
        packed: Tensor, counts: tuple[int, int, int], cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        function: Any = SplitHeads
        query, key, value = function.apply(packed, counts, cos, sin)
        return query, key, value
