"""What the layers of all architectures are made of. Imports no vLLM.

Modules with an exported weight have `load(full)`, which takes the whole tensor from the file.

Shapes: T tokens of all sequences of a batch, n sub-layers of this rank, D hidden size, K head dimension as the
attention kernel has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_vllm.backend import Backend, load_parameter
from kraken_vllm.shares import HeadPadding

Cut = Callable[[Tensor], Tensor]  # an exported tensor -> this rank's part of it
Rotary = tuple[Tensor, Tensor]  # cosines and sines of the angles of each token, (T, 1, K)
NORMALIZE: dict[str, Callable[..., Tensor]] = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm}


def whole(full: Tensor) -> Tensor:
    return full


def empty_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """(T, in) -> (T, out)."""

    def __init__(self, backend: Backend, in_features: int, out_features: int, prefix: str, cut: Cut) -> None:
        super().__init__()
        self.map = backend.linear(in_features, out_features, f"{prefix}.map")
        self.cut = cut

    def load(self, full: Tensor) -> None:
        load_parameter(self.map.weight, self.cut(full))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.map(x)
        return result


class StackedLinear(nn.Module):
    """n independent linear maps, (n, T, in) -> (n, T, out), from an exported weight (N, out, in).

    One batched product, unless there is one map only or the weights are quantized.
    """

    def __init__(
        self, backend: Backend, count: int, in_features: int, out_features: int, prefix: str, cut: Cut
    ) -> None:
        super().__init__()
        self.cut = cut
        self.is_batched = count > 1 and not backend.is_quantized
        if self.is_batched:
            self.weight = empty_parameter(count, out_features, in_features)
        else:
            self.maps = nn.ModuleList(
                backend.linear(in_features, out_features, f"{prefix}.maps.{index}") for index in range(count)
            )

    def load(self, full: Tensor) -> None:
        part = self.cut(full)
        if self.is_batched:
            load_parameter(self.weight, part)
            return
        for one, weight in zip(self.maps, part, strict=True):
            load_parameter(one.weight, weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_batched:
            return torch.bmm(x, self.weight.transpose(1, 2))
        if len(self.maps) == 1:
            only: Tensor = self.maps[0](x[0])
            return only[None]
        return torch.stack([one(x[index]) for index, one in enumerate(self.maps)])


class Norm(nn.Module):
    """LayerNorm without bias or RMSNorm, over the last axis."""

    def __init__(self, norm: str, size: int, epsilon: float, cut: Cut = whole) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.normalize = NORMALIZE[norm]
        self.epsilon = epsilon
        self.cut = cut

    def load(self, full: Tensor) -> None:
        load_parameter(self.weight, self.cut(full))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight.shape, self.weight, eps=self.epsilon)


class StackedNorm(Norm):
    """n norms, each with a gain of its own, over the last axis of (n, T, ..., size)."""

    def __init__(self, count: int, norm: str, size: int, epsilon: float, cut: Cut) -> None:
        super().__init__(norm, size, epsilon, cut)
        self.weight = empty_parameter(count, size)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(len(self.weight), *(1,) * (x.dim() - 2), -1)
        return self.normalize(x, x.shape[-1:], eps=self.epsilon) * weight


class Embedding(nn.Module):
    """Token ids or positions (T,) -> (T, D); whole on each rank."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = empty_parameter(rows, size)

    def load(self, full: Tensor) -> None:
        load_parameter(self.weight, full)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Heads(nn.Module):
    """The attention of all heads of this rank at once: one call of the kernel, and one cache.

    Where K is greater than the model's head dimension, the additional values are zeros by their weights. The scale is
    that of the model. An RMSNorm of queries and keys would divide by the greater number of values: its epsilon and the
    scale make up for that.
    """

    def __init__(self, config: Any, backend: Backend, heads: int, kv_heads: int, prefix: str) -> None:
        super().__init__()
        true, kernel = config.head_dim, config.kernel_head_dim
        self.head_dim = kernel
        self.padding = HeadPadding(true, kernel, in_halves=config.positions == "rope")
        self.qk_epsilon = config.norm_epsilon * true / kernel
        scale = true**-0.5 * (true / kernel if config.qk_norm else 1)
        self.attention = backend.attention(heads, kv_heads, kernel, scale, prefix)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None) -> Tensor:
        """Queries (T, heads, K), keys and values (T, kv_heads, K) -> (T, heads K)."""
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        mixed: Tensor = self.attention(query.flatten(1), key.flatten(1), value.flatten(1))
        return mixed


def rotary_angles(positions: Tensor, config: Any, dtype: torch.dtype) -> Rotary:
    """Positions (T,) -> what `rotate` takes; padded values are not rotated."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, None].float() * (1.0 / config.rope_theta ** (pairs / config.head_dim))
    angles = F.pad(angles, (0, (config.kernel_head_dim - config.head_dim) // 2))
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys (T, heads, K), whose value pairs (j, j + K/2) are rotated."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def ffn_inner(x: Tensor, gate: nn.Module | None, up: nn.Module) -> Tensor:
    """(..., D) -> (..., inner width): GELU without a gate, SwiGLU with one."""
    return F.gelu(up(x), approximate="tanh") if gate is None else F.silu(gate(x)) * up(x)
