"""Errors that say that there is no more memory become one message.

The texts are those of the C library (ENOMEM), of PyTorch's allocators for CPUs and GPUs, of C++ and of Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kraken_train.common.errors import OutOfMemoryError

TEXTS = ("cannot allocate memory", "can't allocate memory", "out of memory", "bad_alloc", "can't start new thread")


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Raises OutOfMemoryError, with the remedy, for an error that says that there is no more memory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if not lacks_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutOfMemoryError(f"there is no more memory ({reason}); {remedy}") from error


def lacks_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in TEXTS)
