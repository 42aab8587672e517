"""The folders of a run's checkpoints, and the manifest in each of them. Imports no torch.

A run's `checkpoints/` folder holds a folder `step-NNNNNNNN/` per checkpoint and a file `latest`, which names the newest
one. `manifest.json` in a checkpoint, which is written last, lists every file with its size and SHA-256, and holds the
metadata that the run stored with the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import is_plain_name, read_file
from kraken_train.common.parsing import find_wrong_type, parse_mapping

FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"
POINTER = "latest"
CONTENT: dict[str, type] = {"format_version": int, "step": int, "metadata": dict, "files": dict}
METADATA: dict[str, type] = {  # those entries that are used
    "model": dict,
    "config": dict,
    "run_id": str,
    "data_fingerprint": str,
    **dict.fromkeys(("updates", "consumed_samples", "tokens", "trained_tokens"), int),
    **dict.fromkeys(("world_size", "sub_layer_parallel_size", "data_parallel_size"), int),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder as its manifest describes it; `metadata` is what the run stored with the tensors."""

    path: Path
    step: int
    metadata: dict[str, Any]
    files: dict[str, dict[str, Any]]  # name -> {"bytes": ..., "sha256": ...}

    def recorded(self, name: str) -> Any:
        """An entry of the metadata that every run stores. Raises CheckpointError where it is missing."""
        if name not in self.metadata:
            raise CheckpointError(f"{self.path / MANIFEST} has no {name}, so it is not of a run of this program")
        return self.metadata[name]


def has_checkpoints(folder: Path) -> bool:
    return bool(step_folders(folder))


def step_folders(folder: Path) -> list[Path]:
    """The folders of complete checkpoints, oldest first: a checkpoint gets this name after it is written."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name))


def step_of(folder: Path) -> int:
    """Of one of `step_folders`."""
    return int(folder.name.removeprefix("step-"))


def read_manifest(path: Path) -> Checkpoint:
    """The checkpoint in `path` as its manifest describes it; no other file is read. Raises CheckpointError."""
    file = path / MANIFEST
    try:
        manifest = parse_mapping(read_file(file))
        content = manifest["content"]
        intact = manifest["sha256"] == content_sha256(content)
        version = content["format_version"]
        checkpoint = Checkpoint(path, content["step"], content["metadata"], content["files"])
        wrong = find_wrong_type(content, CONTENT) or find_wrong_type(checkpoint.metadata, METADATA)
        if wrong is None:
            wrong = next((name for name, entry in checkpoint.files.items() if not is_file_entry(name, entry)), None)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if not intact:
        raise CheckpointError(f"{file} is damaged: its content does not match its checksum")
    if wrong is not None:
        raise CheckpointError(f"{file} is damaged: its entry {wrong!r} cannot be that of a checkpoint")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, but this program reads versions up to {FORMAT_VERSION}; update it"
        )
    return checkpoint


def is_file_entry(name: str, entry: object) -> bool:
    return (
        is_plain_name(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


def find_size_problem(file: Path, expected: dict[str, Any]) -> str | None:
    """How the existence or size of `file` differs from the manifest; None if they do not. Reads no content."""
    try:
        if not file.is_file():
            return f"{file} is missing"
        if file.is_symlink():
            return f"{file} is a link, which no file of a checkpoint is"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None


def find_complete_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files have the sizes in its manifest, and the problems of newer ones.

    Reads only manifests, so the content of the files may still be damaged, unlike with
    `checkpoints.training.store.find_good_checkpoint`.
    """
    problems: list[str] = []
    for path in reversed(step_folders(folder)):
        try:
            checkpoint = read_manifest(path)
            problem = next(filter(None, (find_size_problem(path / n, e) for n, e in checkpoint.files.items())), None)
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            return checkpoint, problems
        if not path.exists():  # meanwhile the run has written a newer one and deleted this one
            return find_complete_checkpoint(folder)
        problems.append(problem)
    return None, problems


def content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
