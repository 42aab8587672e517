"""Rotary position embeddings (RoPE, arXiv 2104.09864) of queries and keys, as Llama has them.

The value pairs (j, j + K/2) of a head are rotated by position / theta^(2j/K). Angles are computed in float32 from the
position alone, so that a token has the same bits whether it comes in a prompt, after a cache, or in training.

Shapes: B batch, T tokens, K head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines of the angles of each token, (T, K) or (B, T, K)."""

    cos: Tensor
    sin: Tensor


def rotary_angles(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Positions (T,) or (B, T) -> what `rotate` takes, in `dtype`."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device) / head_size
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotary: Rotary, heads_axis: int) -> Tensor:
    """Queries or keys, whose axis of heads is `heads_axis` (negative), and which else have the axes (B, T, K)."""
    cos, sin = (part.unsqueeze(heads_axis) for part in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
