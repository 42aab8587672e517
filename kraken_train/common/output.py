"""Where a command writes its results."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.files import is_still, try_lock


def open_output(folder: Path, setting: str = "output_dir") -> None:
    """Raises ConfigError, naming the setting, unless the folder exists afterwards and can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{setting}={folder} cannot be written to: {error.strerror}; use another folder") from error


@contextmanager
def sole_writer(temporary: Path, output_dir: Path) -> Iterator[None]:
    """Make an empty folder that no other process writes to; it is removed if the block fails.

    Raises CheckpointError if another process is writing there.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        if not (try_lock(lock) and is_still(temporary, lock)):
            raise CheckpointError(
                f"output_dir={output_dir} is being written by another process right now; wait for it, or name another"
            )
        try:
            for entry in temporary.iterdir():  # left by a process that was killed
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)
