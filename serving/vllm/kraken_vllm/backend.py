"""What the layers need of the program around them: vLLM, or a test. Imports no vLLM."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from kraken_vllm.shares import Share


class Backend(Protocol):
    """Of one rank."""

    share: Share
    is_quantized: bool  # whether `linear` stores weights in another type

    def attention(self, heads: int, kv_heads: int, head_dim: int, scale: float, prefix: str) -> nn.Module:
        """Causal attention with a cache: queries (T, heads K), keys and values (T, kv_heads K) -> (T, heads K)."""

    def linear(self, in_features: int, out_features: int, prefix: str) -> Any:
        """A bias-free linear map of (T, in) to (T, out), with `weight` (out, in), which `load_parameter` sets."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over ranks, on each of them."""

    def start_sum(self, partial: Tensor) -> Tensor:
        """Begins the sum over ranks; only `add_sum` may look at what is returned."""

    def add_sum(self, partial: Tensor, pending: Tensor, own: Tensor) -> Tensor:
        """`start_sum`'s argument and result, and (n, T, D) -> `own` + the sum, (n, T, D)."""


def load_parameter(parameter: nn.Parameter, part: Tensor) -> None:
    """Sets a parameter, by its own `weight_loader` if it has one. Raises ValueError."""
    loader = getattr(parameter, "weight_loader", None)
    if parameter.shape != part.shape:
        raise ValueError(f"a weight of shape {tuple(part.shape)} where the model has {tuple(parameter.shape)}")
    if loader is not None:
        loader(parameter, part)
    else:
        parameter.data.copy_(part)
