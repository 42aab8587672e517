"""Between attention and FFN: residual, the exchanged sum over all sub-layers, norm.

    r_i = x_i + a_i;  h_i = norm(o_i + s) w_i, where o_i is a_i, or r_i where the FFN reads the stream

In one pass over memory; `layer_entry` adds to r what the FFN makes of h. In the backward pass one kernel adds the
gradients of o that come from the residual and from the norm, and sums that of s over the sub-layers here.

Shapes: n sub-layers here, B batch, T tokens, D hidden size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken_train.kernels.norm import load_moments, moments, norm_gradient
from kraken_train.kernels.operators import compute_type, operator, programs_for, statistics, tile, wrap_triton


@triton.jit
def ffn_entry_kernel(
    x_pointer, attended_pointer, total_pointer, gain_pointer, residual_pointer, normed_pointer, mean_pointer,
    reciprocal_pointer, tokens, epsilon, N: tl.constexpr, D: tl.constexpr, CENTER: tl.constexpr,
    READS_STREAM: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (row < N) & (column < D)
    vector = row * tokens + token
    place = vector * D + column
    attended = tl.load(attended_pointer + place, mask, other=0.0).to(COMPUTE)
    x = tl.load(x_pointer + place, mask, other=0.0).to(COMPUTE)
    residual = x + attended
    tl.store(residual_pointer + place, residual, mask)
    own = residual if READS_STREAM else attended
    total = tl.load(total_pointer + token * D + column, column < D, other=0.0).to(COMPUTE)
    joint = tl.where(mask, own + total, 0.0)
    mean, reciprocal = moments(joint, mask, epsilon, D, CENTER)
    tl.store(mean_pointer + vector, mean, row < N)
    tl.store(reciprocal_pointer + vector, reciprocal, row < N)
    gain = tl.load(gain_pointer + row * D + column, mask, other=0.0).to(COMPUTE)
    tl.store(normed_pointer + place, (joint - mean) * reciprocal * gain, mask)


@triton.jit
def ffn_entry_backward_kernel(
    own_pointer, total_pointer, gain_pointer, mean_pointer, reciprocal_pointer, residual_gradient_pointer,
    normed_gradient_pointer, own_gradient_pointer, total_gradient_pointer, gain_gradient_pointer,
    tokens, N: tl.constexpr, D: tl.constexpr, CENTER: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (row < N) & (column < D)
    gain = tl.load(gain_pointer + row * D + column, mask, other=0.0).to(COMPUTE)
    gain_gradient = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    token = tl.program_id(0).to(tl.int64)
    for _ in range(0, tl.cdiv(tokens - tl.program_id(0), tl.num_programs(0))):
        place = (row * tokens + token) * D + column
        mean, reciprocal = load_moments(mean_pointer, reciprocal_pointer, token, tokens, N, BLOCK_N)
        joint = tl.load(own_pointer + place, mask, other=0.0).to(COMPUTE)
        joint += tl.load(total_pointer + token * D + column, column < D, other=0.0).to(COMPUTE)
        normed = tl.where(mask, (joint - mean) * reciprocal, 0.0)
        normed_gradient = tl.load(normed_gradient_pointer + place, mask, other=0.0).to(COMPUTE)
        gain_gradient += normed_gradient * normed
        gradient = norm_gradient(normed, normed_gradient * gain, reciprocal, D, CENTER)
        total_gradient = tl.sum(gradient, axis=0, keep_dims=True)
        tl.store(total_gradient_pointer + token * D + column, total_gradient, column < D)
        gradient += tl.load(residual_gradient_pointer + place, mask, other=0.0).to(COMPUTE)
        tl.store(own_gradient_pointer + place, gradient, mask)
        token += tl.num_programs(0)
    tl.store(gain_gradient_pointer + (tl.program_id(0) * N + row) * D + column, gain_gradient, mask)


@operator("ffn_entry")
def ffn_entry(
    x: Tensor, attended: Tensor, total: Tensor, gain: Tensor, epsilon: float, center: bool, reads_stream: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_i and a_i (n, B, T, D), s (B, T, D), w (n, D) -> r_i, h_i, and for the backward pass mean and reciprocal
    deviation of each o_i + s, (n, B T).
    """
    x, attended, total, gain = x.contiguous(), attended.contiguous(), total.contiguous(), gain.contiguous()
    residual, normed, mean, reciprocal = torch.empty_like(x), torch.empty_like(x), statistics(x), statistics(x)
    (n, width), tokens = gain.shape, mean.shape[1]
    wrap_triton(ffn_entry_kernel)[(tokens,)](
        x, attended, total, gain, residual, normed, mean, reciprocal, tokens, epsilon,
        N=n, D=width, CENTER=center, READS_STREAM=reads_stream, COMPUTE=compute_type(x.dtype), **tile(n, width),
    )  # fmt: skip
    return residual, normed, mean, reciprocal


@operator("ffn_entry_backward")
def ffn_entry_backward(
    own: Tensor, total: Tensor, gain: Tensor, mean: Tensor, reciprocal: Tensor, center: bool,
    residual_gradient: Tensor, normed_gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of o_i (n, B, T, D), of s, summed over the sub-layers here, (B, T, D), and of w, (n, D)."""
    own, total, gain = own.contiguous(), total.contiguous(), gain.contiguous()
    residual_gradient, normed_gradient = residual_gradient.contiguous(), normed_gradient.contiguous()
    (n, width), tokens = gain.shape, mean.shape[1]
    programs = programs_for(tokens)
    gradient, total_gradient = torch.empty_like(own), torch.empty_like(total)
    gain_gradients = mean.new_empty((programs, n, width))
    wrap_triton(ffn_entry_backward_kernel)[(programs,)](
        own, total, gain, mean, reciprocal, residual_gradient, normed_gradient, gradient, total_gradient,
        gain_gradients, tokens, N=n, D=width, CENTER=center, COMPUTE=compute_type(own.dtype), **tile(n, width),
    )  # fmt: skip
    return gradient, total_gradient, gain_gradients.sum(dim=0).to(gain.dtype)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, attended, total, gain, _, ctx.center, ctx.reads_stream = inputs
    residual, _, mean, reciprocal = output
    ctx.save_for_backward(residual if ctx.reads_stream else attended, total, gain, mean, reciprocal)


def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    own_gradient, total_gradient, gain_gradient = ffn_entry_backward(*ctx.saved_tensors, ctx.center, *gradients[:2])
    stream_gradient = own_gradient if ctx.reads_stream else gradients[0]
    return stream_gradient, own_gradient, total_gradient, gain_gradient, None, None, None


ffn_entry.register_autograd(backward, setup_context=keep)
