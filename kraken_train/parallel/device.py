"""The device on which a command runs."""

from __future__ import annotations

import torch

from kraken_train.common.errors import ConfigError
from kraken_train.parallel.ranks import gpu_is_usable

DEVICES = ("auto", "cpu", "cuda")


def choose_device(setting: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises ConfigError for `cuda` without a GPU."""
    if setting == "cuda" and not gpu_is_usable():
        reason = "DS_ACCELERATOR=cpu says not to use one" if torch.cuda.is_available() else "PyTorch sees no GPU here"
        raise ConfigError(f"device=cuda, but {reason}; use cpu or auto")
    return torch.device("cuda" if setting != "cpu" and gpu_is_usable() else "cpu")
