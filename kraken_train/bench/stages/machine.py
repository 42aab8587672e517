"""What the machine is and what it could do at most: versions, backends of attention, FLOP/s and bandwidth."""

from __future__ import annotations

import importlib.metadata
import platform
from types import ModuleType

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kraken_train.bench.stages.preset import MachineSizes
from kraken_train.bench.stages.program import Measured
from kraken_train.parallel.device import choose_device

PACKAGES = ("torch", "deepspeed", "triton", "flash-attn", "liger-kernel", "quack-kernels")
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
HEADS = {64: 6, 128: 4, 168: 3}  # head dimension -> heads; the paper's 125M 4-way has 168
NOT_AVAILABLE = "not available"


def measure(sizes: MachineSizes, calls: ModuleType) -> Measured:
    device = choose_device("auto")
    figures: dict[str, float | str] = {
        "matrix products in bf16, TFLOP/s": matmul_tflops(sizes, calls, device),
        "memory, TB/s": copy_bandwidth(sizes, calls, device),
    }
    attention = {str(head_dim): attention_times(head_dim, sizes, calls, device) for head_dim in HEADS}
    for head_dim, times in attention.items():
        usable = {name: seconds for name, seconds in times.items() if not isinstance(seconds, str)}
        figures[f"fastest attention of heads of {head_dim}"] = min(usable, key=usable.__getitem__)
    return Measured(figures, {"machine": calls.describe(), "versions": versions(), "attention, seconds": attention})


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def matmul_tflops(sizes: MachineSizes, calls: ModuleType, device: torch.device) -> float:
    n = sizes.matmul_size
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * n**3 / calls.seconds(lambda: left @ right, sizes.repeats) / 1e12)


def copy_bandwidth(sizes: MachineSizes, calls: ModuleType, device: torch.device) -> float:
    source = torch.zeros(sizes.copied_mib * 2**20, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return float(2 * source.nbytes / calls.seconds(lambda: target.copy_(source), sizes.repeats) / 1e12)


def attention_times(
    head_dim: int, sizes: MachineSizes, calls: ModuleType, device: torch.device
) -> dict[str, float | str]:
    """Seconds of causal attention, forward and backward, by backend; NOT_AVAILABLE where there is none."""
    shape = (sizes.attention_rows, HEADS[head_dim], sizes.attention_tokens, head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ones = torch.ones(shape, device=device, dtype=torch.bfloat16)

    def both() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).backward(ones)

    found: dict[str, float | str] = {}
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                found[backend.name] = calls.seconds(both, sizes.repeats)
        except RuntimeError:  # PyTorch has no kernel of this backend for these shapes here
            found[backend.name] = NOT_AVAILABLE
    return found
