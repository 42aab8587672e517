"""The number format of training: what `precision=auto` chooses, and what a device computes natively."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from kraken_train.config import AUTO
from kraken_train.settings.parallel import ParallelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CUDA_WITH_BF16 = (8, 0)  # compute capability of the first NVIDIA GPUs with bf16 units: A100
CPU_FLAGS_WITH_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}  # of Intel, Intel and AMD, Arm, as Linux names them
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class ChosenPrecision:
    """The precision of a start and why; `slow`: not all of its devices compute it natively."""

    name: str  # bf16 | fp32
    reason: str
    slow: bool = False

    def describe(self) -> str:
        text = f"precision {self.name}: {self.reason}"
        return f"{text}; slow here, because a device has no native {self.name}" if self.slow else text


def choose_precision(requested: str, recorded: str | None, native_bf16: bool) -> ChosenPrecision:
    """`recorded` is what a run that is continued began with, `native_bf16` whether all its devices now have bf16."""
    if requested != AUTO:
        name, reason = requested, "as set"
    elif recorded is not None:
        name, reason = recorded, "as this run began (precision=auto)"
    elif native_bf16:
        name, reason = "bf16", "native on this device (precision=auto)"
    else:
        name, reason = "fp32", "this device has no native bf16 (precision=auto)"
    return ChosenPrecision(name, reason, slow=name == "bf16" and not native_bf16)


def reduce_dtype(parallel: ParallelConfig) -> torch.dtype | None:
    """The least exact format in which sums over the ranks of a model copy are computed; None: that of the values."""
    return None if parallel.reduce_dtype is None else DTYPES[parallel.reduce_dtype]


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device has units for bf16 products; without them bf16 is emulated, and slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= CUDA_WITH_BF16
    return not CPU_FLAGS_WITH_BF16.isdisjoint(cpu_flags())


def cpu_flags() -> set[str]:
    """The instruction sets of this machine's processor; none where Linux does not list them."""
    return {flag for value in cpu_values("flags", "Features") for flag in value.split()}


def processor_name() -> str:
    """The model of this machine's processor; its instruction set where Linux does not name it."""
    return next(iter(cpu_values("model name")), platform.machine())


def cpu_values(*keys: str) -> list[str]:
    """What Linux lists of the processor under any of these keys."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(keys)]
