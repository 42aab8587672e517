"""The activation of the FFN and the product after it, which keep no activation for the backward pass.

    GELU    f_i = W_i gelu(u_i)            (tanh approximation, arXiv 1606.08415)
    SwiGLU  f_i = W_i (silu(g_i) u_i)      (arXiv 2002.05202)

The gradient of W needs the activation. It is the largest tensor of a layer, so it is not kept: the kernel of the
backward pass, which reads u (and g) anyway, writes it again beside their gradients. `torch.compile` does the same with
the plain form; here it holds without compilation too.

Shapes: n sub-layers here, B batch, T tokens, D hidden size, F FFN size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken_train.kernels.operators import compute_type, operator, wrap_triton
from kraken_train.kernels.selection import padded

BLOCK = 2048  # values of a program


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gelu_kernel(up_pointer, result_pointer, size, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    x = tl.load(up_pointer + place, mask, other=0.0).to(COMPUTE)
    # 0.5 (1 + tanh z) = sigmoid(2 z)
    tl.store(result_pointer + place, x * sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x)), mask)


@triton.jit
def gelu_backward_kernel(
    gradient_pointer, up_pointer, up_gradient_pointer, result_pointer, size, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    x = tl.load(up_pointer + place, mask, other=0.0).to(COMPUTE)
    gradient = tl.load(gradient_pointer + place, mask, other=0.0).to(COMPUTE)
    part = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    slope = part + x * part * (1.0 - part) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    tl.store(result_pointer + place, x * part, mask)
    tl.store(up_gradient_pointer + place, gradient * slope, mask)


@triton.jit
def swiglu_kernel(gate_pointer, up_pointer, result_pointer, size, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    gate = tl.load(gate_pointer + place, mask, other=0.0).to(COMPUTE)
    up = tl.load(up_pointer + place, mask, other=0.0).to(COMPUTE)
    tl.store(result_pointer + place, gate * sigmoid(gate) * up, mask)


@triton.jit
def swiglu_backward_kernel(
    gradient_pointer, gate_pointer, up_pointer, gate_gradient_pointer, up_gradient_pointer, result_pointer, size,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    gradient = tl.load(gradient_pointer + place, mask, other=0.0).to(COMPUTE)
    gate = tl.load(gate_pointer + place, mask, other=0.0).to(COMPUTE)
    up = tl.load(up_pointer + place, mask, other=0.0).to(COMPUTE)
    part = sigmoid(gate)
    tl.store(result_pointer + place, gate * part * up, mask)
    tl.store(up_gradient_pointer + place, gradient * gate * part, mask)
    tl.store(gate_gradient_pointer + place, gradient * up * part * (1.0 + gate * (1.0 - part)), mask)


def launch(size: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the settings of an elementwise kernel."""
    block = min(BLOCK, padded(size))
    return (triton.cdiv(size, block),), {"COMPUTE": compute_type(dtype), "BLOCK": block}


@operator("gelu")
def gelu(up: Tensor) -> Tensor:
    up = up.contiguous()
    result = torch.empty_like(up)
    grid, settings = launch(up.numel(), up.dtype)
    wrap_triton(gelu_kernel)[grid](up, result, up.numel(), **settings)
    return result


@operator("gelu_backward")
def gelu_backward(gradient: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of u, and gelu(u)."""
    gradient, up = gradient.contiguous(), up.contiguous()
    up_gradient, result = torch.empty_like(up), torch.empty_like(up)
    grid, settings = launch(up.numel(), up.dtype)
    wrap_triton(gelu_backward_kernel)[grid](gradient, up, up_gradient, result, up.numel(), **settings)
    return up_gradient, result


@operator("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    result = torch.empty_like(up)
    grid, settings = launch(up.numel(), up.dtype)
    wrap_triton(swiglu_kernel)[grid](gate, up, result, up.numel(), **settings)
    return result


@operator("swiglu_backward")
def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of g and of u, and silu(g) u."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    gate_gradient, up_gradient, result = torch.empty_like(up), torch.empty_like(up), torch.empty_like(up)
    grid, settings = launch(up.numel(), up.dtype)
    wrap_triton(swiglu_backward_kernel)[grid](
        gradient, gate, up, gate_gradient, up_gradient, result, up.numel(), **settings
    )
    return gate_gradient, up_gradient, result


def product(a: Tensor, b: Tensor) -> Tensor:
    """(n, p, q) and (n, q, r) -> (n, p, r); one matrix is an ordinary product, as in `StackedLinear`."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


class ActivatedProduct(torch.autograd.Function):
    """g, or None for GELU, and u (n, B, T, F), W (n, D, F) -> f (n, B, T, D)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor | None, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(*(() if gate is None else (gate,)), up, weight)
        active = gelu(up) if gate is None else swiglu(gate, up)
        result = product(active.flatten(1, 2), weight.transpose(1, 2))
        return result.view(*up.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        *inputs, weight = ctx.saved_tensors
        rows = gradient.contiguous().flatten(1, 2)
        inner = product(rows, weight).view_as(inputs[-1])
        if len(inputs) == 1:
            up_gradient, active = gelu_backward(inner, *inputs)
            gate_gradient = None
        else:
            gate_gradient, up_gradient, active = swiglu_backward(inner, *inputs)
        return gate_gradient, up_gradient, product(rows.transpose(1, 2), active.flatten(1, 2))
