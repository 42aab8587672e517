"""What the kernels compute, in plain PyTorch with its gradients: the same functions as in `fused`.

Shapes: n sub-layers here, B batch, T tokens, D hidden size, F FFN size, H heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm(x: Tensor, gain: Tensor, epsilon: float, center: bool) -> Tensor:
    """LayerNorm without bias or, not centered, RMSNorm, of (n, B, T, D) with a gain (n, D)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=epsilon) if center else F.rms_norm(x, x.shape[-1:], eps=epsilon)
    return normed * gain[:, None, None]


def layer_entry(
    x: Tensor, added: Tensor, gain: Tensor, epsilon: float, center: bool, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y_i = x_i + f_i (n, B, T, D), their sum over i (B, T, D) in `sum_dtype`, norm(y_i) w_i (n, B, T, D)."""
    y = x + added
    return y, y.sum(dim=0, dtype=sum_dtype), norm(y, gain, epsilon, center)


def ffn_entry(
    x: Tensor, attended: Tensor, total: Tensor, gain: Tensor, epsilon: float, center: bool, reads_stream: bool
) -> tuple[Tensor, Tensor]:
    """x_i + a_i and norm(a_i + s) w_i, both (n, B, T, D); s is (B, T, D). With `reads_stream`: norm(x_i + a_i + s)."""
    residual = x + attended
    return residual, norm((residual if reads_stream else attended) + total, gain, epsilon, center)


def activated_product(gate: Tensor | None, up: Tensor, weight: Tensor) -> Tensor:
    """GELU, or SwiGLU where there is a gate, of (n, B, T, F), times W_i (n, D, F) -> (n, B, T, D)."""
    active = F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up
    return torch.bmm(active.flatten(1, 2), weight.transpose(1, 2)).view(*up.shape[:-1], -1)


def split_heads(
    packed: Tensor, counts: tuple[int, int, int], cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, B, T, H + 2 G, K) -> (n, B, T, H, K) and twice (n, B, T, G, K); with angles, (T, K) or (B, T, K), rotated."""
    query, key, value = packed.split(counts, dim=3)
    if cos is not None and sin is not None:
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    return query, key, value


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)
