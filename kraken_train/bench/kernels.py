"""Times of the fused kernels (`kraken_train.kernels`) beside their twins, which `torch.compile` makes kernels of.

On a GPU each call is recorded in a CUDA graph, so that what counts is the work of the device. `Comparison.bytes` is
what a kernel must move at least, each value once, so `bytes_per_second` is near the memory's rate for a good kernel.

Shapes: n sub-layers here, B batch, T tokens, D hidden size, F FFN size, H heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.kernels import twins
from kraken_train.model.architecture import ModelConfig

EPSILON = 1e-5


@dataclass(frozen=True)
class Comparison:
    """Of a kernel and its twin."""

    name: str
    seconds: float
    twin_seconds: float
    bytes: int  # that one call must read and write

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": self.seconds,
            "twin_seconds": self.twin_seconds,
            "bytes": self.bytes,
            "bytes_per_second": self.bytes_per_second,
            "speed_up": self.twin_seconds / self.seconds,
        }


@dataclass(frozen=True)
class Call:
    """What is timed: the same call of a kernel and of its twin."""

    name: str
    kernel: Callable[[], Any]
    twin: Callable[[], Any]
    bytes: int


def compare_kernels(
    config: ModelConfig, samples: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, ranks: int = 1
) -> list[Comparison]:
    """Of one layer of a Kraken on one of `ranks` ranks, in a micro-batch of `samples`; both of GELU and SwiGLU.

    Needs Triton, and on a CPU its interpreter (see `kraken_train.kernels.selection`).
    """
    # The backward pass of a compiled function is measured more than once after one forward pass.
    with torch._functorch.config.patch(donated_buffer=False):
        return [
            Comparison(call.name, seconds_of(call.kernel, device), seconds_of(call.twin, device), call.bytes)
            for call in make_calls(config, samples, device, dtype, config.num_streams // ranks)
        ]


def make_calls(config: ModelConfig, samples: int, device: torch.device, dtype: torch.dtype, n: int) -> list[Call]:
    tokens, width = config.context_length, config.hidden_size
    shape = (n, samples, tokens)
    x, added, *gradients = (random((*shape, width), device, dtype) for _ in range(4))
    total, total_gradient = (random((samples, tokens, width), device, dtype) for _ in range(2))
    gain = random((n, width), device, dtype)
    center = config.norm == "layernorm"
    stream, one = x.nbytes, total.nbytes
    return [
        *passes(
            "layer_entry",
            (x, added, gain),
            (EPSILON, center, dtype),
            (gradients[0], total_gradient, gradients[1]),
            (4 * stream + one, 4 * stream + one),
        ),
        *passes(
            "ffn_entry",
            (x, added, total, gain),
            (EPSILON, center, False),
            (gradients[0], gradients[1]),
            (4 * stream + one, 4 * stream + 2 * one),
        ),
        *activation_calls((*shape, config.ffn_size), device, dtype),
        *head_calls(config, shape, device, dtype),
    ]


def passes(
    name: str,
    inputs: Sequence[Tensor],
    settings: tuple[Any, ...],
    gradients: Sequence[Tensor],
    sizes: tuple[int, int],
) -> list[Call]:
    """A function forward, and forward and backward; `sizes` are the bytes of each of the two passes."""
    from kraken_train.kernels.fused import FusedKernels  # noqa: PLC0415 (imports Triton, which may be missing)

    kernel, twin = getattr(FusedKernels, name), compiled(getattr(twins, name), inputs[0].device)
    leaves = [value.detach().requires_grad_() for value in inputs]

    def forward(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*inputs, *settings)

    def both(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*leaves, *settings), leaves, gradients)

    return [
        Call(f"{name}, forward", forward(kernel), forward(twin), sizes[0]),
        Call(f"{name}, forward and backward", both(kernel), both(twin), sum(sizes)),
    ]


def activation_calls(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Call]:
    """Without the products beside them. The backward pass gives the activation too."""
    from kraken_train.kernels import activation  # noqa: PLC0415 (imports Triton, which may be missing)

    gate, up, gradient = (random(shape, device, dtype) for _ in range(3))
    size = up.nbytes
    plain = [compiled(function, device) for function in (gelu, gelu_backward, swiglu, swiglu_backward)]
    return [
        Call("gelu, forward", lambda: activation.gelu(up), lambda: plain[0](up), 2 * size),
        Call(
            "gelu, backward",
            lambda: activation.gelu_backward(gradient, up),
            lambda: plain[1](gradient, up),
            4 * size,
        ),
        Call("swiglu, forward", lambda: activation.swiglu(gate, up), lambda: plain[2](gate, up), 3 * size),
        Call(
            "swiglu, backward",
            lambda: activation.swiglu_backward(gradient, gate, up),
            lambda: plain[3](gradient, gate, up),
            6 * size,
        ),
    ]


def head_calls(
    config: ModelConfig, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[Call]:
    """The gradients come as attention returns them: (n B, H, T, K) in the order (n B, T, H, K) of memory."""
    counts = (config.heads, config.kv_heads, config.kv_heads)
    packed = random((*shape, sum(counts), config.head_size), device, dtype)
    gradients = [random((*shape, count, config.head_size), device, dtype) for count in counts]
    angles = random((shape[2], config.head_size), device, torch.float32)
    size = 2 * packed.nbytes
    _, plain = passes("split_heads", (packed,), (counts,), gradients, (0, size))  # forward there are only views
    if config.head_size % 2:
        return [plain]
    rotary = (counts, angles.cos().to(dtype), angles.sin().to(dtype))
    return [
        plain,
        *(
            Call(f"{call.name}, with rope", call.kernel, call.twin, call.bytes)
            for call in passes("split_heads", (packed,), rotary, gradients, (size, size))
        ),
    ]


def gelu(up: Tensor) -> Tensor:
    return F.gelu(up, approximate="tanh")


def gelu_backward(gradient: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.gelu_backward(gradient, up, approximate="tanh"), gelu(up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate), swiglu(gate, up)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """On a CPU as it is: compiling for one says nothing about a GPU."""
    return torch.compile(function, dynamic=False, fullgraph=True) if device.type == "cuda" else function


def random(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), device=device).to(dtype)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call: the median on a GPU, one call on a CPU."""
    if device.type == "cuda":
        call()  # compiles
        from triton.testing import do_bench_cudagraph  # noqa: PLC0415 (Triton may be missing)

        return float(do_bench_cudagraph(call, rep=50, return_mode="median")) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def as_table(comparisons: Sequence[Comparison]) -> str:
    lines = [f"{'kernel':44} {'us':>8} {'twin us':>8} {'faster':>7} {'GB/s':>7}"]
    for one in comparisons:
        faster = f"{one.twin_seconds / one.seconds:.2f}x"
        rate = one.bytes_per_second / 1e9
        lines.append(f"{one.name:44} {one.seconds * 1e6:8.1f} {one.twin_seconds * 1e6:8.1f} {faster:>7} {rate:7.0f}")
    return "\n".join(lines)
