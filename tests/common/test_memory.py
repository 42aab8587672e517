"""Errors about memory, as the system and the libraries word them, become one message; others stay as they are."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from kraken_train.common.errors import OutOfMemoryError
from kraken_train.common.memory import memory_errors


def refused_by_pytorch() -> Exception:
    """The error of PyTorch's own allocator, which no machine can satisfy here."""
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exabyte was given")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of"),
        refused_by_pytorch(),
    ],
)
def test_errors_about_memory(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^there is no more memory \(.+\); use less$") as caught, \
            memory_errors("use less"):  # fmt: skip
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("shapes differ")])
def test_other_errors(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_errors("use less"):
        raise error
    assert caught.value is error
