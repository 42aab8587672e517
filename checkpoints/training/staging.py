"""Checkpoints by way of a disk of each node: written there first, then copied to the run's folder.

Each rank writes and hashes its part in a folder of its own, `STAGE/step-NNNNNNNN.rank-RRRRR/`, with the manifest of the
whole checkpoint. When all have, `staged.json` in the run's `checkpoints/` names what is staged. Then the ranks copy the
parts to a temporary folder there, check their hashes on the way, and publish it as `checkpoints.training.writer` does.
`staged.json` is removed last, so a start after a kill between the two finds on its nodes what is not copied yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.training.manifest import MANIFEST, Checkpoint, read_manifest
from checkpoints.training.retention import Retention
from checkpoints.training.root_message import root_message
from checkpoints.training.writer import (
    WrittenPart,
    delete_old,
    describe_failed_save,
    describe_file,
    make_empty,
    publish,
    unfinished,
    write_manifest,
    write_tensors,
)
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import BLOCK_BYTES, file_sha256, read_file, replace_synced, sync_folder
from kraken_train.common.parsing import find_wrong_type, parse_mapping
from kraken_train.parallel.ranks import Runtime

STAGED = "staged.json"
RECORD: dict[str, type] = {"step": int, "manifest_sha256": str, "stage": str, "hosts": list}


@dataclass(frozen=True)
class Staged:
    """The checkpoint that is staged and not copied yet, as `staged.json` in the run's `checkpoints/` names it."""

    step: int
    manifest_sha256: str  # of the file that is in each part
    stage: str  # its folder, the same on all nodes
    hosts: tuple[str, ...]  # the nodes

    def describe(self) -> str:
        return f"the checkpoint of step {self.step}, staged in {self.stage} on {', '.join(self.hosts)}"


@dataclass(frozen=True)
class CopiedPart(WrittenPart):
    """What one rank copied; `damage`: why it did not, if the staged file is not what was written."""

    damage: str | None = None


def open_stage(stage: Path, needed: int, runtime: Runtime) -> None:
    """Make the folder on this node, with room for the `needed` bytes of each rank's part. A collective.

    Raises CheckpointError, on all ranks.
    """
    problem, disk, free = None, None, 0
    try:
        stage.mkdir(parents=True, exist_ok=True)
        for leftover in stage.iterdir():  # `take_up_staged` has copied what is of use
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryFile(dir=stage):
            disk, free = stage.stat().st_dev, shutil.disk_usage(stage).free
    except OSError as error:
        problem = f"cannot be written to: {error.strerror}; set it to a folder on a local disk that this user can write"
    nodes = runtime.gather(((socket.gethostname(), disk), needed, free, problem))
    for place, _, room, reason in nodes:
        total = sum(size for where, size, _, _ in nodes if where == place)
        small = (
            f"has {room / 2**20:.0f} MiB free, but a checkpoint takes {total / 2**20:.0f} MiB there; free some space, "
            "or set it to a folder on a larger disk"
        )
        if reason is not None or total > room:
            raise CheckpointError(f"checkpoint.stage_dir: {stage} on {place[0]} {reason or small}")


def stage_checkpoint(
    stage: Path, folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any], runtime: Runtime
) -> None:
    """Write the checkpoint of `step` to `stage` on each node, and name it in `folder`, the run's `checkpoints/`.

    A collective, as `save_checkpoint`. Raises CheckpointError with the same message on all ranks if one cannot write.
    """
    part = part_folder(stage, step, runtime.rank)
    temporary = stage / f".{part.name}.tmp"
    try:
        require_success(stage, folder, step, runtime.gather(failure_of(lambda: make_empty(temporary))))
        written = runtime.gather(write_staged_part(tensors, temporary, runtime))
        require_success(stage, folder, step, [each.failure for each in written])
        # The files of rank 0 include the index. The metadata is rank 0's, as in a checkpoint that is not staged.
        first_metadata = runtime.on_first(lambda: metadata)
        files = {name: entry for each in written for name, entry in sorted(each.files.items())}

        def complete() -> None:
            write_manifest(temporary, step, first_metadata, files)
            shutil.rmtree(part, ignore_errors=True)
            temporary.rename(part)
            sync_folder(stage)

        require_success(stage, folder, step, runtime.gather(failure_of(complete)))
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)
        raise
    hosts = tuple(dict.fromkeys(runtime.gather(socket.gethostname())))
    runtime.on_first(lambda: write_record(folder, Staged(step, file_sha256(part / MANIFEST), str(stage), hosts)))


def part_folder(stage: Path, step: int, rank: int) -> Path:
    return stage / f"step-{step:08d}.rank-{rank:05d}"


def write_staged_part(tensors: dict[str, Tensor], folder: Path, runtime: Runtime) -> WrittenPart:
    """Write this rank's part, on rank 0 with the index, and hash it."""
    failure = write_tensors(tensors, folder, runtime)
    if failure is not None:
        return WrittenPart({}, failure)
    try:
        return WrittenPart({path.name: describe_file(path) for path in folder.iterdir()}, None)
    except OSError as error:
        return WrittenPart({}, root_message(error))


def failure_of(function: Callable[[], object]) -> str | None:
    """Why this rank could not do it; None: it could."""
    try:
        function()
    except (OSError, CheckpointError) as error:
        return root_message(error)
    return None


def require_success(stage: Path, folder: Path, step: int, failures: list[str | None]) -> None:
    """Raises CheckpointError, on all ranks, for the first of the ranks' failures."""
    for failure in filter(None, failures):
        raise CheckpointError(describe_failed_save(folder, step, failure, stage))


def publish_staged(folder: Path, step: int, retention: Retention, runtime: Runtime) -> None:
    """Copy what `stage_checkpoint` has staged, then delete what `retention` does not keep.

    A collective. Raises CheckpointError with the same message on all ranks if a part cannot be copied; what is staged
    stays then, for the next start.
    """
    problem = copy_staged(folder, runtime)
    if problem is not None:
        raise CheckpointError(f"the checkpoint of step {step} could not be copied to {folder}: {problem}")
    runtime.on_first(lambda: delete_old(folder, retention))


def take_up_staged(folder: Path, runtime: Runtime) -> str | None:
    """At a start: copy to `folder` what an earlier start has staged and not copied. A collective.

    Returns what deserves a line on the console. Raises CheckpointError if it cannot be written to `folder`.
    """
    staged = runtime.on_first(lambda: read_record(folder))
    if staged is None:
        return None
    problem = copy_staged(folder, runtime)
    if problem is None:
        return f"copied {staged.describe()}, to {folder}"
    runtime.on_first((folder / STAGED).unlink)
    return f"note: {staged.describe()}, was not copied to {folder} and cannot be now: {problem}; it is passed over"


def copy_staged(folder: Path, runtime: Runtime) -> str | None:
    """Copy the staged parts to `folder`, publish the checkpoint, and delete the parts. A collective.

    Each file is copied by a rank on its node. Returns why what is staged cannot be used: a part is on no node of this
    start, or damaged. Raises CheckpointError if it cannot be written to `folder`.
    """
    staged = runtime.on_first(lambda: read_record(folder))
    if staged is None or runtime.on_first(lambda: is_published(folder, staged)):
        runtime.on_first(lambda: (folder / STAGED).unlink(missing_ok=True))
        return None
    here = parts_here(staged)
    paths = {path.name: path for part in here for path in part.path.iterdir() if path.name != MANIFEST}
    seen = runtime.gather((sorted(paths), here[0] if here else None))
    manifest = next((checkpoint for _, checkpoint in seen if checkpoint is not None), None)
    if manifest is None:
        return f"none of it is on {socket.gethostname() if runtime.world_size == 1 else 'the nodes of this start'}"
    own = []
    for number, name in enumerate(sorted(manifest.files)):
        holders = [rank for rank, (names, _) in enumerate(seen) if name in names]
        if not holders:
            return f"{name} of it is on no node of this start"
        if holders[number % len(holders)] == runtime.rank:
            own.append(name)
    temporary = unfinished(folder, staged.step)
    runtime.on_first(lambda: make_empty(temporary))
    copied = runtime.gather(copy_part({name: paths[name] for name in own}, manifest, temporary))
    damage = next((part.damage for part in copied if part.damage is not None), None)
    if damage is not None:
        runtime.on_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        return damage
    runtime.on_first(lambda: publish(folder, temporary, staged.step, manifest.metadata, copied))
    runtime.on_first((folder / STAGED).unlink)
    for part in here:
        shutil.rmtree(part.path, ignore_errors=True)
    return None


def parts_here(staged: Staged) -> list[Checkpoint]:
    """The parts of the staged checkpoint on this node."""
    found = []
    for path in sorted(Path(staged.stage).glob(f"step-{staged.step:08d}.rank-*")):
        try:
            if file_sha256(path / MANIFEST) == staged.manifest_sha256:
                found.append(read_manifest(path))
        except (OSError, CheckpointError):
            continue  # a part that is damaged or being deleted is no part
    return found


def copy_part(paths: dict[str, Path], manifest: Checkpoint, target: Path) -> CopiedPart:
    """Copy these files to the folder `target`."""
    files = {}
    for name, path in paths.items():
        try:
            digest = copy_synced(path, target / name)
        except OSError as error:
            return CopiedPart({}, root_message(error))
        if digest != manifest.files[name]["sha256"]:
            return CopiedPart({}, None, f"{path} is damaged: its SHA-256 is not that of the manifest")
        files[name] = manifest.files[name]
    return CopiedPart(files, None)


def copy_synced(source: Path, target: Path) -> str:
    """Copy a file and wait until the disk has it; the SHA-256 of what was copied. Raises OSError."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(BLOCK_BYTES):
            digest.update(block)
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()


def is_published(folder: Path, staged: Staged) -> bool:
    """Whether the start that staged it was killed after the copy was complete."""
    manifest = folder / f"step-{staged.step:08d}" / MANIFEST
    return manifest.is_file() and file_sha256(manifest) == staged.manifest_sha256


def write_record(folder: Path, staged: Staged) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_synced(folder / STAGED, json.dumps(asdict(staged), indent=1))
    except OSError as error:
        raise CheckpointError(describe_failed_save(folder, staged.step, root_message(error))) from error


def read_record(folder: Path) -> Staged | None:
    """None: nothing is staged. Raises CheckpointError."""
    try:
        record = parse_mapping(read_file(folder / STAGED))
        if (wrong := find_wrong_type(record, RECORD)) is not None:
            raise ValueError(f"its entry {wrong} is of another type")
        return Staged(record["step"], record["manifest_sha256"], record["stage"], tuple(record["hosts"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / STAGED} cannot be read ({error}); delete it, and what is staged is lost"
        ) from error
