"""Whether a run computes with the fused kernels."""

from __future__ import annotations

import importlib.util

import torch

from kraken_train.common.errors import ConfigError

KERNELS_SETTING = "engine.fused_kernels"  # of training


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


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU: TRITON_INTERPRET=1 was set when it was imported."""
    from kraken_train.kernels.operators import INTERPRETED  # noqa: PLC0415 (imports Triton, which may be missing)

    return INTERPRETED
