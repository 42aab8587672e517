"""Writes a checkpoint atomically, by all ranks together; `checkpoints.training.background` says when.

A checkpoint is written under a temporary name, with sizes and SHA-256 in its manifest, synced and renamed; only then
`latest` names it. Each rank writes and hashes a share.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from checkpoints.training.index import read_index
from checkpoints.training.manifest import FORMAT_VERSION, MANIFEST, POINTER, Checkpoint, content_sha256, step_folders
from checkpoints.training.retention import Retention
from checkpoints.training.root_message import root_message
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256, replace_synced, sync_folder, write_synced
from kraken_train.parallel.ranks import Runtime


@dataclass(frozen=True)
class WrittenPart:
    """The part of a checkpoint that one rank wrote."""

    files: dict[str, dict[str, Any]]  # entries of the manifest
    failure: str | None  # why it could not be written


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    retention: Retention,
    runtime: Runtime,
) -> None:
    """Write `tensors` and `metadata` as the checkpoint of `step`, then delete what `retention` does not keep.

    A collective. Each name is a plain tensor on exactly one rank, or a DTensor on the ranks of its mesh; ranks may have
    different names. Raises CheckpointError with the same message on all ranks if one of them cannot write; the previous
    checkpoints are not changed then.
    """
    temporary = unfinished(folder, step)
    runtime.on_first(lambda: make_empty(temporary))
    parts = runtime.gather(write_part(tensors, temporary, runtime))
    runtime.on_first(lambda: publish(folder, temporary, step, metadata, parts))
    runtime.on_first(lambda: delete_old(folder, retention))


def unfinished(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is until it is complete."""
    return folder / f".step-{step:08d}.tmp"


def write_part(tensors: dict[str, Tensor], folder: Path, runtime: Runtime) -> WrittenPart:
    """Write this rank's part and hash its files, so that the ranks hash in parallel."""
    failure = write_tensors(tensors, folder, runtime)
    if failure is not None:
        return WrittenPart({}, failure)
    try:
        own = folder.glob(f"__{runtime.rank}_*.distcp")  # the checkpoint library's names
        return WrittenPart({path.name: describe_file(path) for path in own}, None)
    except OSError as error:
        return WrittenPart({}, root_message(error))


def write_tensors(tensors: dict[str, Tensor], folder: Path, runtime: Runtime) -> str | None:
    """Write this rank's part of the checkpoint; the error message, or None."""
    try:
        dcp.save(tensors, checkpoint_id=folder, process_group=runtime.group, no_dist=runtime.world_size == 1)
    except (CheckpointException, OSError, RuntimeError) as error:
        return root_message(error)
    return None


def publish(folder: Path, temporary: Path, step: int, metadata: dict[str, Any], parts: Sequence[WrittenPart]) -> None:
    """On rank 0: complete what all ranks wrote to the checkpoint of `step`. Raises CheckpointError."""
    final = folder / f"step-{step:08d}"
    try:
        for part in parts:
            if part.failure is not None:
                raise CheckpointError(describe_failed_save(folder, step, part.failure))
        written = {name: entry for part in parts for name, entry in part.files.items()}
        require_all_parts(temporary, written)
        files = {path.name: written.get(path.name) or describe_file(path) for path in sorted(temporary.iterdir())}
        write_manifest(temporary, step, metadata, files)
        if final.exists():  # the run went back to an earlier checkpoint and reached this step again
            discard(final)
        temporary.rename(final)
        replace_synced(folder / POINTER, final.name + "\n")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(describe_failed_save(folder, step, root_message(error))) from error
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_manifest(folder: Path, step: int, metadata: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """The last file of a checkpoint, after which the disk has all of it. Raises OSError."""
    content = {"format_version": FORMAT_VERSION, "step": step, "metadata": metadata, "files": files}
    write_synced(folder / MANIFEST, json.dumps({"content": content, "sha256": content_sha256(content)}, indent=1))
    sync_folder(folder)


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest's entry of a file. Raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def require_all_parts(temporary: Path, written: dict[str, dict[str, Any]]) -> None:
    """Raises CheckpointError unless this node sees the files of all ranks, as on a shared file system."""
    indexed = {info.relative_path for info in read_index(temporary, complete=False).storage_data.values()}
    for part in sorted(indexed | written.keys()):
        path = temporary / part
        size = path.stat().st_size if path.is_file() else None
        if size is None or size != written.get(part, {}).get("bytes", size):
            raise CheckpointError(
                f"{part} of the checkpoint was written by another node, but on this one it is "
                f"{'missing' if size is None else 'different'} in {temporary}; run_dir must be on a file system that "
                "all nodes share"
            )


def delete_old(folder: Path, retention: Retention) -> None:
    try:
        for path in retention.superfluous(step_folders(folder), time.time()):
            discard(path)
    except OSError as error:
        raise CheckpointError(f"old checkpoints in {folder} cannot be removed: {error}") from error
    for leftover in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)


def delete_newer_checkpoints(checkpoint: Checkpoint) -> None:
    """Delete the checkpoints of later steps, which the run will repeat. Raises CheckpointError."""
    folder = checkpoint.path.parent
    try:
        replace_synced(folder / POINTER, checkpoint.path.name + "\n")
        for path in step_folders(folder):
            if path.name > checkpoint.path.name:
                discard(path)
    except OSError as error:
        raise CheckpointError(f"the checkpoints after {checkpoint.path} cannot be removed: {error}") from error


def discard(path: Path) -> None:
    """Rename and delete a checkpoint, so that an interrupted deletion leaves no incomplete one under its name."""
    renamed = path.with_name(f".{path.name}.old")
    shutil.rmtree(renamed, ignore_errors=True)
    path.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def make_empty(folder: Path) -> None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {folder}: {error.strerror}") from error


def describe_failed_save(folder: Path, step: int, reason: str, stage: Path | None = None) -> str:
    """`folder` has the run's checkpoints; `stage`: it was to be written there first."""
    place, setting = (folder, "run_dir") if stage is None else (stage, "checkpoint.stage_dir")
    free = shutil.disk_usage(place).free / 2**20
    kept = step_folders(folder)
    previous = f"the newest good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
    return (
        f"the checkpoint of step {step} could not be written to {place}: {reason} ({free:.0f} MiB free on its disk); "
        f"{previous}. Free some space, or set {setting} to another disk, and start the same command again"
    )
