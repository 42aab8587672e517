"""Which exports were made of a run: RUN_DIR/exports.jsonl, `step` and `path` of each. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Any

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import read_file
from kraken_train.common.parsing import find_wrong_type, parse_mapping

EXPORTS_FILE = "exports.jsonl"
TYPES: dict[str, type | UnionType] = {"step": int, "path": str}
FILES_OF_AN_EXPORT = "config.json", "model.safetensors"  # as in checkpoints.exports.folder, which imports torch


def record_export(path: Path, export_dir: Path, step: int) -> None:
    """Note in the run's folder that its checkpoint of `step` was exported. Raises OSError if it cannot be written."""
    with (path / EXPORTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "path": str(export_dir.resolve())}) + "\n")


def read_exports(path: Path) -> list[dict[str, Any]]:
    """`step` and `path` of the exports that were made of the run, the newest last. Raises CheckpointError."""
    file = path / EXPORTS_FILE
    try:
        records = [parse_mapping(line) for line in read_file(file).splitlines()] if file.exists() else []
        if any(not record.keys() >= TYPES.keys() or find_wrong_type(record, TYPES) for record in records):
            raise ValueError("an entry has no step or no path")
        return [{name: record[name] for name in TYPES} for record in records]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); remove it, and name exports instead of the run") from error


def is_export(folder: Path) -> bool:
    """Whether it looks like one from outside."""
    return all((folder / name).is_file() for name in FILES_OF_AN_EXPORT)
