"""Whether a run computes with the fused kernels."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch

from kraken_train.common.errors import ConfigError

KERNELS_SETTING = "engine.fused_kernels"  # of training
# Values that a program holds at once, n vectors of D, each padded to a power of two. Code for an H100 with more of them
# keeps some in memory instead of registers (Triton 3.7: 0.3 kB a thread at 2^14, 2 kB at 2^15, 11 kB at 2^16).
LARGEST_TILE = 2**14


class ModelWithKernels(Protocol):
    def use_fused_kernels(self) -> bool:
        """Compute with them from now on; False where they do not fit its sizes (`fits_kernels`)."""
        ...


def use_kernels(model: ModelWithKernels, setting: bool | None, device: torch.device, name: str) -> None:
    """Let `model` compute with the kernels if `choose_kernels` says so and they fit.

    Raises ConfigError as `choose_kernels`, and where kernels are asked for that do not fit.
    """
    if choose_kernels(setting, device, name) and not model.use_fused_kernels() and setting:
        raise ConfigError(
            f"{name}=true, but the kernels take at most {LARGEST_TILE} values of a token: the sub-layers of a rank times "
            "model.hidden_size, each rounded up to a power of two; use null, or more ranks per copy of the model"
        )


def choose_kernels(setting: bool | None, device: torch.device, name: str) -> bool:
    """`setting` as a user gave it under `name`; None: kernels on a GPU where Triton is installed.

    Raises ConfigError where kernels are asked for that cannot run. On a CPU they run in Triton's interpreter only.
    """
    if setting is False:
        return False
    installed = importlib.util.find_spec("triton") is not None
    if setting is None:
        return installed and device.type == "cuda"
    if not installed:
        raise ConfigError(f"{name}=true, but Triton is not installed; install triton, or use null or false")
    if device.type != "cuda" and not interpreted():
        raise ConfigError(
            f"{name}=true needs a GPU, and this runs on {device.type}; use null or false (TRITON_INTERPRET=1 runs the "
            "kernels on a CPU, slowly, for tests)"
        )
    return True


def fits_kernels(sub_layers: int, width: int) -> bool:
    """Whether vectors of so many sub-layers on a rank are few and short enough for the kernels."""
    return padded(sub_layers) * padded(width) <= LARGEST_TILE


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, because TRITON_INTERPRET=1 is set."""
    import triton  # noqa: PLC0415 (may be missing)

    return bool(triton.knobs.runtime.interpret)
