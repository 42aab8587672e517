"""Writing a run's checkpoints: all or nothing, by all ranks together, while training waits or in the background.

A checkpoint is written under a temporary name, listed with sizes and SHA-256 in its manifest, synced, renamed, and only
then pointed to. Each rank writes and hashes a share.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from checkpoints.training.manifest import FORMAT_VERSION, MANIFEST, POINTER, Checkpoint, content_sha256, step_folders
from checkpoints.training.store import read_index, root_message
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256, replace_synced, sync_folder, write_synced
from kraken_train.parallel.ranks import Runtime

PATIENCE_AFTER_ERROR = 600.0  # seconds for a save under way when training has failed; a dead disk may never answer


@dataclass(frozen=True)
class WrittenPart:
    """What one rank has written of a checkpoint."""

    files: dict[str, dict[str, Any]]  # as the manifest lists them
    failure: str | None  # why it could not


class CheckpointWriter:
    """Saves a run's checkpoints, either while the caller waits or in the background. Creating one is a collective.

    In the background a thread does what `save_checkpoint` does, and its ranks agree over a process group of their own,
    so that their messages never mix with training's. At most one save is under way. All ranks must call `save` and
    `finish` in the same order. As a context manager it finishes when the block ends:

        with CheckpointWriter(folder, keep=3, runtime=runtime, asynchronous=True) as writer:
            writer.save(step, tensors, metadata)

    An error that ends the block is not replaced by that of a save, which is printed only. The thread never keeps the
    interpreter from exiting. `on_saved` is called on rank 0, maybe in the thread, with the step of each checkpoint that
    is complete.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        runtime: Runtime,
        asynchronous: bool,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.asynchronous = asynchronous
        if asynchronous and runtime.world_size > 1:
            runtime = replace(runtime, group=dist.new_group(backend="gloo"))
        self.runtime = runtime
        self.on_saved = on_saved
        self.under_way: BackgroundSave | None = None

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Save as `save_checkpoint` does, or start to; a save that is still under way is finished before.

        In the background nobody may change `tensors`, which are on the CPU, or `metadata` any more. Raises
        CheckpointError on all ranks if this save failed, or in the background the one before it.
        """
        self.finish()

        def save() -> None:
            save_checkpoint(self.folder, step, tensors, metadata, self.keep, self.runtime)
            if self.runtime.is_first:
                self.on_saved(step)

        if self.asynchronous:
            self.under_way = BackgroundSave(save)
            self.under_way.start()
        else:
            save()

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one. Raises CheckpointError on all ranks if it failed."""
        failure = self.wait(None)
        if failure is not None:
            raise failure

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed, which `save` and `finish` will raise."""
        return self.under_way is not None and self.under_way.failure is not None

    def wait(self, seconds: float | None) -> BaseException | None:
        """Wait for the save that is under way, and forget it; why it failed, if it did."""
        if self.under_way is None:
            return None
        self.under_way.join(seconds)  # when that is interrupted, the save is still under way
        finished, self.under_way = self.under_way, None
        return finished.failure

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
            return
        # The threads of all ranks agree without the main ones, so the save can end well although training did not.
        failure = self.wait(PATIENCE_AFTER_ERROR)
        if failure is not None and self.runtime.is_first:
            reason = failure if isinstance(failure, CheckpointError) else "another rank has ended"
            print(f"note: a save was under way, and failed as well: {reason}", file=sys.stderr, flush=True)


class BackgroundSave(threading.Thread):
    """A save and, once it has ended, why it failed. A daemon: Python exits without waiting for it."""

    def __init__(self, save: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.save = save
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.save()
        except BaseException as error:  # told by the thread that waits; the library's errors are no Exception
            self.failure = error
        del self.save  # and with it the tensors


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any], keep: int, runtime: Runtime
) -> None:
    """Write `tensors` and `metadata` as the checkpoint of `step`, then drop all but the newest `keep`. A collective.

    Each name is a plain tensor on exactly one rank, or a DTensor on the ranks of its mesh; ranks may hold different
    names. Raises CheckpointError, with one message, on all ranks where one of them cannot write; the previous
    checkpoints are untouched then.
    """
    temporary = folder / f".step-{step:08d}.tmp"
    runtime.on_first(lambda: make_empty(temporary))
    parts = runtime.gather(write_part(tensors, temporary, runtime))
    runtime.on_first(lambda: publish(folder, temporary, step, metadata, parts))
    runtime.on_first(lambda: drop_old(folder, keep))


def write_part(tensors: dict[str, Tensor], folder: Path, runtime: Runtime) -> WrittenPart:
    """Write this rank's part and describe its files, so that the ranks hash in parallel."""
    failure = write_tensors(tensors, folder, runtime)
    if failure is not None:
        return WrittenPart({}, failure)
    try:
        own = folder.glob(f"__{runtime.rank}_*.distcp")  # as the library names them
        return WrittenPart({path.name: describe_file(path) for path in own}, None)
    except OSError as error:
        return WrittenPart({}, root_message(error))


def write_tensors(tensors: dict[str, Tensor], folder: Path, runtime: Runtime) -> str | None:
    """This rank's part of the checkpoint; what went wrong, if anything did."""
    try:
        dcp.save(tensors, checkpoint_id=folder, process_group=runtime.group, no_dist=runtime.world_size == 1)
    except (CheckpointException, OSError, RuntimeError) as error:
        return root_message(error)
    return None


def publish(folder: Path, temporary: Path, step: int, metadata: dict[str, Any], parts: list[WrittenPart]) -> None:
    """Rank 0: make what all ranks have written the checkpoint of `step`. Raises CheckpointError."""
    final = folder / f"step-{step:08d}"
    try:
        for part in parts:
            if part.failure is not None:
                raise CheckpointError(describe_failed_save(folder, step, part.failure))
        written = {name: entry for part in parts for name, entry in part.files.items()}
        require_all_parts(temporary, written)
        files = {path.name: written.get(path.name) or describe_file(path) for path in sorted(temporary.iterdir())}
        content = {"format_version": FORMAT_VERSION, "step": step, "metadata": metadata, "files": files}
        write_synced(
            temporary / MANIFEST, json.dumps({"content": content, "sha256": content_sha256(content)}, indent=1)
        )
        sync_folder(temporary)
        if final.exists():  # the same step, written again after falling back behind it
            discard(final)
        temporary.rename(final)
        replace_synced(folder / POINTER, final.name + "\n")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(describe_failed_save(folder, step, root_message(error))) from error
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def describe_file(path: Path) -> dict[str, Any]:
    """What the manifest lists of a file. Raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def require_all_parts(temporary: Path, written: dict[str, dict[str, Any]]) -> None:
    """Raises CheckpointError unless the files of all ranks are here, as they are on a shared file system."""
    indexed = {info.relative_path for info in read_index(temporary).storage_data.values()}
    for part in sorted(indexed | written.keys()):
        path = temporary / part
        seen = path.stat().st_size if path.is_file() else None
        if seen is None or seen != written.get(part, {}).get("bytes", seen):
            raise CheckpointError(
                f"{part} of the checkpoint was written by another node and cannot be seen in {temporary}"
                f"{'' if seen is None else ' as it was written'}; run_dir must be on a file system that all nodes share"
            )


def drop_old(folder: Path, keep: int) -> None:
    try:
        for path in step_folders(folder)[:-keep]:
            discard(path)
    except OSError as error:
        raise CheckpointError(f"old checkpoints in {folder} cannot be removed: {error}") from error
    for leftover in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)


def go_back_to(checkpoint: Checkpoint) -> None:
    """Delete the checkpoints of later steps, which the run will do again. Raises CheckpointError."""
    folder = checkpoint.path.parent
    try:
        replace_synced(folder / POINTER, checkpoint.path.name + "\n")
        for path in step_folders(folder):
            if path.name > checkpoint.path.name:
                discard(path)
    except OSError as error:
        raise CheckpointError(f"the checkpoints after {checkpoint.path} cannot be removed: {error}") from error


def discard(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a deletion cut short leaves no half of one under a good name."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def make_empty(folder: Path) -> None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {folder}: {error.strerror}") from error


def describe_failed_save(folder: Path, step: int, reason: str) -> str:
    free = shutil.disk_usage(folder).free / 2**20
    kept = step_folders(folder)
    previous = f"the newest good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
    return (
        f"the checkpoint of step {step} could not be written to {folder}: {reason} ({free:.0f} MiB free on its disk); "
        f"{previous}. Free some space, or set run_dir to another disk, and start the same command again"
    )
