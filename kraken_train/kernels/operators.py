"""How a Triton kernel becomes an operator of PyTorch, on a GPU and in Triton's interpreter.

On a GPU an operator is a `torch.library.triton_op`: `torch.compile` sees the kernels in it, and plans memory and
launches with them. Triton's interpreter (TRITON_INTERPRET=1 when Triton is imported) runs kernels on a CPU with NumPy,
for tests. PyTorch cannot trace an interpreted kernel, so an operator is an opaque `torch.library.custom_op` there.

This file and those of the kernels have no `from __future__ import annotations`, since PyTorch reads the types of an
operator's arguments from its annotations.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch._subclasses import FakeTensor
from torch.library import custom_op, triton_op
from torch.library import wrap_triton as wrap_compiled

from kraken_train.kernels.selection import interpreted, padded

INTERPRETED = interpreted()
WIDE = {torch.float64: tl.float64}  # what kernels compute in; float32 for every other type
PROGRAMS = 512  # of a kernel that adds up a gain's gradient: four on each multiprocessor of an H100
TOKENS_OF_A_PROGRAM = 4  # at least


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function of tensors that launches kernels by `wrap_triton` and mutates no argument."""

    def define(function: Callable[..., Any]) -> Any:
        if not INTERPRETED:
            return triton_op(f"kraken::{name}", mutates_args=())(function)
        opaque = custom_op(f"kraken::{name}", function, mutates_args=())
        opaque.register_fake(function)
        return opaque

    return define


def wrap_triton(kernel: Any) -> Any:
    """`kernel` for a launch within an `operator`. PyTorch looks for calls of this name in the operator's source."""
    return Interpreted(kernel) if INTERPRETED else wrap_compiled(kernel)


class Interpreted:
    """A kernel in the interpreter, which computes nothing for tensors without values."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **settings: Any) -> None:
            if not any(isinstance(argument, FakeTensor) for argument in args):
                self.kernel[grid](*args, **settings)

        return launch


def tile(rows: int, columns: int) -> dict[str, int]:
    """Settings of a kernel whose programs hold (rows, columns) values at once: its tile, padded, and its warps."""
    padded_rows, padded_columns = padded(rows), padded(columns)
    # 16 values a thread, as long as the warps last: enough loads under way, and few enough registers.
    warps = min(16, max(1, padded_rows * padded_columns // 512))
    return {"BLOCK_N": padded_rows, "BLOCK_D": padded_columns, "num_warps": warps}


def compute_type(dtype: torch.dtype) -> Any:
    """The type in which kernels compute with values of `dtype`."""
    return WIDE.get(dtype, tl.float32)


def statistics(x: torch.Tensor) -> torch.Tensor:
    """For a number of each vector of x (n, ..., D), in the type in which kernels compute: (n, tokens), not filled."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[0], x.numel() // (x.shape[0] * x.shape[-1])), dtype=dtype)


def programs_for(tokens: int) -> int:
    """How many programs share the tokens where each one adds up its part of a gain's gradient.

    The number does not depend on the device, so neither does the order of the sum.
    """
    return max(1, min(PROGRAMS, tokens // TOKENS_OF_A_PROGRAM))
