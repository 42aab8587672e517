"""What an error of the checkpoint library, torch.distributed.checkpoint, was at first."""

from __future__ import annotations

import errno
import os

from torch.distributed.checkpoint.api import CheckpointException


def root_message(error: BaseException) -> str:
    """The innermost error message, such as "No space left on device"; the checkpoint library wraps it in others."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno is not None:
            return os.strerror(chain.errno)
        chain = chain.__cause__ or chain.__context__
    text = str(error).strip().splitlines()
    # On a full disk a write is short. PyTorch's zip writer then reports only positions.
    return os.strerror(errno.ENOSPC) if "unexpected pos" in str(error) else (text[0] if text else type(error).__name__)
