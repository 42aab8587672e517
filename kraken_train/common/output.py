"""Where a benchmark writes its results."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kraken_train.common.errors import ConfigError


def open_output(folder: Path) -> None:
    """Raises ConfigError unless the folder exists afterwards and can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir={folder} cannot be written to: {error.strerror}; give output_dir=FOLDER"
        ) from error
