"""Queries, keys and values out of the packed product that makes them, and their gradient packed again.

Forward, queries, keys and values are views of the packed tensor; with rotary embeddings, of one that has the first two
rotated. Backward, one kernel writes the three gradients into one packed tensor and undoes the rotation, whatever the
strides in which the attention returns them.

Shapes: n sub-layers here, B batch, T tokens, H heads, G key-value heads, K head dimension.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken_train.kernels.operators import compute_type, operator, tile, wrap_triton


@triton.jit
def pack_kernel(
    query_pointer, key_pointer, value_pointer, cos_pointer, sin_pointer, packed_pointer,
    query_n, query_b, query_t, query_h, key_n, key_b, key_t, key_h, value_n, value_b, value_t, value_h,
    angle_b, angle_t, batch, tokens, SIGN: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of n B T
    t, b, n = row % tokens, row // tokens % batch, row // (tokens * batch)
    head, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = column < K
    is_query, is_key = inside & (head < H), inside & (head >= H) & (head < H + G)
    is_value = inside & (head >= H + G) & (head < H + 2 * G)
    query_pointer += n * query_n + b * query_b + t * query_t + head * query_h
    key_pointer += n * key_n + b * key_b + t * key_t + (head - H) * key_h
    value_pointer += n * value_n + b * value_b + t * value_t + (head - H - G) * value_h
    # Each value comes from one of the three; the others give 0.
    x = tl.load(query_pointer + column, is_query, other=0.0).to(COMPUTE)
    x += tl.load(key_pointer + column, is_key, other=0.0).to(COMPUTE)
    if SIGN != 0:
        # Of a pair (j, j + K / 2): x_j cos - x_j' sin and x_j' cos + x_j sin. SIGN = -1 undoes it.
        other = (column + K // 2) % K
        partner = tl.load(query_pointer + other, is_query, other=0.0).to(COMPUTE)
        partner += tl.load(key_pointer + other, is_key, other=0.0).to(COMPUTE)
        angle = b * angle_b + t * angle_t + column
        cos = tl.load(cos_pointer + angle, inside, other=0.0).to(COMPUTE)
        sin = tl.load(sin_pointer + angle, inside, other=0.0).to(COMPUTE) * SIGN
        x = x * cos + tl.where(column < K // 2, -partner, partner) * sin
    x += tl.load(value_pointer + column, is_value, other=0.0).to(COMPUTE)
    place = (row * (H + 2 * G) + head) * K + column
    tl.store(packed_pointer + place, x, inside & (head < H + 2 * G))


def pack(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Within an operator. `sign`: 1 rotates, -1 rotates back, 0 does neither and reads no angles."""
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    cos, sin = cos.contiguous(), sin.contiguous()
    n, batch, tokens, heads, width = query.shape
    groups = key.shape[3]
    packed = query.new_empty((n, batch, tokens, heads + 2 * groups, width))
    angle_strides = (0 if cos.dim() == 2 else cos.stride(0), cos.stride(-2))
    wrap_triton(pack_kernel)[(n * batch * tokens,)](
        query, key, value, cos, sin, packed, *query.stride()[:4], *key.stride()[:4], *value.stride()[:4],
        *angle_strides, batch, tokens, SIGN=sign, H=heads, G=groups, K=width, COMPUTE=compute_type(query.dtype),
        **tile(heads + 2 * groups, width),
    )  # fmt: skip
    return packed


@operator("pack_heads")
def pack_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(n, B, T, H, K) and twice (n, B, T, G, K) -> (n, B, T, H + 2 G, K), from any strides."""
    return pack(query, key, value, query.new_empty((1, 1)), query.new_empty((1, 1)), sign=0)


@operator("pack_rotated_heads")
def pack_rotated_heads(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The same with queries and keys rotated, or rotated back if `sign` is -1; angles (T, K) or (B, T, K)."""
    return pack(query, key, value, cos, sin, sign)


class SplitHeads(torch.autograd.Function):
    """(n, B, T, H + 2 G, K) -> queries (n, B, T, H, K), keys and values (n, B, T, G, K)."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, counts: tuple[int, int, int], cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if cos is not None and sin is not None:
            ctx.save_for_backward(cos, sin)
            packed = pack_rotated_heads(*packed.split(counts, dim=3), cos, sin, 1)
        query, key, value = packed.split(counts, dim=3)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        rotary = ctx.saved_tensors
        packed = pack_rotated_heads(query, key, value, *rotary, -1) if rotary else pack_heads(query, key, value)
        return packed, None, None, None
