"""Where a layer ends and the next one begins: residual, sum over the sub-layers here, norm.

    y_i = x_i + f_i;  p = sum_i y_i;  h_i = norm(y_i) w_i

In one pass over memory; p goes to the other ranks (`start_all_reduce`), h to the attention. In the backward pass the
gradients of y that come from the residual, from all ranks' sum and from the norm are added in the kernel that computes
the last of them.

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
def layer_entry_kernel(
    x_pointer, added_pointer, gain_pointer, y_pointer, sum_pointer, normed_pointer, mean_pointer, reciprocal_pointer,
    tokens, epsilon, N: tl.constexpr, D: tl.constexpr, CENTER: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (row < N) & (column < D)
    vector = row * tokens + token
    place = vector * D + column
    y = tl.load(x_pointer + place, mask, other=0.0).to(COMPUTE)
    y += tl.load(added_pointer + place, mask, other=0.0).to(COMPUTE)
    # Rounded as it is stored, so that the sum and the norm are those of what the backward pass reads.
    y = y.to(y_pointer.dtype.element_ty)
    tl.store(y_pointer + place, y, mask)
    y = y.to(COMPUTE)
    total = tl.sum(y, axis=0, keep_dims=True)
    tl.store(sum_pointer + token * D + column, total, column < D)
    mean, reciprocal = moments(y, mask, epsilon, D, CENTER)
    tl.store(mean_pointer + vector, mean, row < N)
    tl.store(reciprocal_pointer + vector, reciprocal, row < N)
    gain = tl.load(gain_pointer + row * D + column, mask, other=0.0).to(COMPUTE)
    tl.store(normed_pointer + place, (y - mean) * reciprocal * gain, mask)


@triton.jit
def layer_entry_backward_kernel(
    y_pointer, gain_pointer, mean_pointer, reciprocal_pointer, y_gradient_pointer, sum_gradient_pointer,
    normed_gradient_pointer, gradient_pointer, gain_gradient_pointer,
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
        y = tl.load(y_pointer + place, mask, other=0.0).to(COMPUTE)
        normed = tl.where(mask, (y - mean) * reciprocal, 0.0)
        normed_gradient = tl.load(normed_gradient_pointer + place, mask, other=0.0).to(COMPUTE)
        gain_gradient += normed_gradient * normed
        gradient = norm_gradient(normed, normed_gradient * gain, reciprocal, D, CENTER)
        gradient += tl.load(y_gradient_pointer + place, mask, other=0.0).to(COMPUTE)
        gradient += tl.load(sum_gradient_pointer + token * D + column, column < D, other=0.0).to(COMPUTE)
        tl.store(gradient_pointer + place, gradient, mask)
        token += tl.num_programs(0)
    tl.store(gain_gradient_pointer + (tl.program_id(0) * N + row) * D + column, gain_gradient, mask)


@operator("layer_entry")
def layer_entry(
    x: Tensor, added: Tensor, gain: Tensor, epsilon: float, center: bool, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_i and f_i (n, B, T, D), w (n, D) -> y_i, p (B, T, D) in `sum_dtype`, h_i, and for the backward pass mean and
    reciprocal deviation of each y_i, (n, B T).
    """
    x, added, gain = x.contiguous(), added.contiguous(), gain.contiguous()
    y, normed, mean, reciprocal = torch.empty_like(x), torch.empty_like(x), statistics(x), statistics(x)
    total = x.new_empty(x.shape[1:], dtype=sum_dtype)
    (n, width), tokens = gain.shape, mean.shape[1]
    wrap_triton(layer_entry_kernel)[(tokens,)](
        x, added, gain, y, total, normed, mean, reciprocal, tokens, epsilon,
        N=n, D=width, CENTER=center, COMPUTE=compute_type(x.dtype), **tile(n, width),
    )  # fmt: skip
    return y, total, normed, mean, reciprocal


@operator("layer_entry_backward")
def layer_entry_backward(
    y: Tensor, gain: Tensor, mean: Tensor, reciprocal: Tensor, center: bool,
    y_gradient: Tensor, sum_gradient: Tensor, normed_gradient: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of y, (n, B, T, D), which is that of x and f too, and of w, (n, D)."""
    y_gradient, sum_gradient = y_gradient.contiguous(), sum_gradient.contiguous()
    normed_gradient, gain = normed_gradient.contiguous(), gain.contiguous()
    (n, width), tokens = gain.shape, mean.shape[1]
    programs = programs_for(tokens)
    gradient, gain_gradients = torch.empty_like(y), mean.new_empty((programs, n, width))
    wrap_triton(layer_entry_backward_kernel)[(programs,)](
        y, gain, mean, reciprocal, y_gradient, sum_gradient, normed_gradient, gradient, gain_gradients, tokens,
        N=n, D=width, CENTER=center, COMPUTE=compute_type(y.dtype), **tile(n, width),
    )  # fmt: skip
    return gradient, gain_gradients.sum(dim=0).to(gain.dtype)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, _, mean, reciprocal = output
    ctx.save_for_backward(y, inputs[2], mean, reciprocal)
    ctx.center = inputs[4]


def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    y, gain, mean, reciprocal = ctx.saved_tensors
    gradient, gain_gradient = layer_entry_backward(y, gain, mean, reciprocal, ctx.center, *gradients[:3])
    return gradient, gradient, gain_gradient, None, None, None


layer_entry.register_autograd(backward, setup_context=keep)
