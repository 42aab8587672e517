"""Which exports were made of a run: RUN_DIR/exports.jsonl, `step` and `path` of each. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kraken_train.common.errors import CheckpointError

EXPORTS_FILE = "exports.jsonl"
FILES_OF_AN_EXPORT = "config.json", "model.safetensors"  # as in checkpoints.exports.folder, which imports torch


def record_export(path: Path, export_dir: Path, step: int) -> None:
    """Note in the run's folder that its checkpoint of `step` was exported. Raises OSError if it cannot be written."""
    with (path / EXPORTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "path": str(export_dir.resolve())}) + "\n")


def read_exports(path: Path) -> list[dict[str, Any]]:
    """`step` and `path` of the exports that were made of the run, the newest last. Raises CheckpointError."""
    file = path / EXPORTS_FILE
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        return [{"step": int(record["step"]), "path": str(record["path"])} for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); remove it, and name exports instead of the run") from error


def is_export(folder: Path) -> bool:
    """Whether it looks like one from outside."""
    return all((folder / name).is_file() for name in FILES_OF_AN_EXPORT)
