"""Which device an inference entry runs on."""

from __future__ import annotations

import torch

from kraken_train.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(setting: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises ConfigError for `cuda` without a GPU."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no GPU here; use cpu or auto")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")
