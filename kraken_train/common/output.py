"""Where a command writes its results."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kraken_train.common.errors import ConfigError


def open_output(folder: Path, setting: str = "output_dir") -> None:
    """Raises ConfigError, naming the setting, unless the folder exists afterwards and can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{setting}={folder} cannot be written to: {error.strerror}; use another folder") from error
