"""The device on which a command runs, and on which its threads run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def own_queue(device: torch.device) -> Iterator[None]:
    """For a thread beside training: `device` with a stream of its own.

    A new thread has GPU 0 and the stream of the training there. What it waits for would be the training on that GPU,
    and every other process would open GPU 0 as well, which takes some hundred MB.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
