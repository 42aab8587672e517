"""A run's saves: while training waits or in the background, by way of a local disk, and to object storage."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints.training.manifest import Checkpoint
from checkpoints.training.remote import RemoteFolder, delete_newer_remote, upload_checkpoint
from checkpoints.training.retention import Retention
from checkpoints.training.staging import publish_staged, stage_checkpoint
from checkpoints.training.writer import delete_newer_checkpoints, save_checkpoint
from kraken_train.common.errors import CheckpointError
from kraken_train.parallel.device import own_queue
from kraken_train.parallel.ranks import Runtime

ERROR_TIMEOUT = 600.0  # seconds to wait for a background save after training failed; a dead disk may never answer


class CheckpointWriter:
    """Saves a run's checkpoints, while the caller waits or in the background. The constructor is a collective.

    In the background a thread runs `save_checkpoint` with a process group of its own, so that its messages do not mix
    with those of training. At most one save is in progress. All ranks must call `save` and `finish` in the same order.
    With `stage`, a folder on a disk of this node, a save is written there first. The copy to `folder`, and that of a
    complete checkpoint to `remote`, are always made in the background. As a context manager it calls `finish` when the
    block ends:

        with CheckpointWriter(folder, Retention(keep=3), runtime, asynchronous=True) as writer:
            writer.save(step, tensors, metadata)

    An error that ends the block is raised; an error of a save is then only printed. The thread does not keep the
    interpreter from exiting. `on_saved` is called on rank 0, possibly in the thread, with the step of each complete
    checkpoint, `on_upload_failed` likewise with that of one that could not be copied to `remote`, and why. The end of
    the block raises the error of the last upload, if that failed.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        runtime: Runtime,
        asynchronous: bool,
        on_saved: Callable[[int], None] = lambda step: None,
        stage: Path | None = None,
        remote: RemoteFolder | None = None,
        on_upload_failed: Callable[[int, str], None] = lambda step, reason: None,
    ) -> None:
        self.folder = folder
        self.retention = retention
        self.asynchronous = asynchronous
        self.stage = stage
        self.remote = remote
        if (asynchronous or stage is not None or remote is not None) and runtime.world_size > 1:
            runtime = replace(runtime, group=dist.new_group(backend="gloo"))
        self.runtime = runtime
        self.on_saved = on_saved
        self.on_upload_failed = on_upload_failed
        self.upload_failure: CheckpointError | None = None  # of the newest checkpoint
        self.last_kept: int | None = None  # later steps in `remote` are to be deleted before the next upload
        self.under_way: BackgroundSave | None = None

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Save, or begin to, after waiting for a save that is still in progress.

        With a background save, `tensors`, which are on the CPU, and `metadata` must not be changed afterwards. Raises
        CheckpointError on all ranks if this save failed, or in the background the one before it.
        """
        self.finish()
        arguments = (step, tensors, metadata)
        phases: list[Callable[[], None]] = []
        if self.stage is None:
            phases.append(partial(save_checkpoint, self.folder, *arguments, self.retention, self.runtime))
        else:
            phases.append(partial(stage_checkpoint, self.stage, self.folder, *arguments, self.runtime))
            phases.append(partial(publish_staged, self.folder, step, self.retention, self.runtime))
        phases.append(partial(self.report, step))
        if self.remote is not None:
            phases.append(partial(self.upload, self.remote, step))
        if not self.asynchronous:
            phases.pop(0)()
        if self.asynchronous or len(phases) > 1:
            self.under_way = BackgroundSave(phases, self.runtime.device)
            self.under_way.start()
        else:
            self.report(step)

    def discard_newer(self, checkpoint: Checkpoint) -> None:
        """Delete the checkpoints of later steps, which the run will repeat. A collective. Raises CheckpointError.

        Those in `remote` are deleted before the next upload, if that cannot be done now.
        """
        self.finish()

        self.runtime.on_first(lambda: delete_newer_checkpoints(checkpoint))
        if self.remote is not None:
            self.last_kept = checkpoint.step
            try:
                self.discard_remote(self.remote)
            except CheckpointError as error:
                self.report_failed_upload(checkpoint.step, error)

    def discard_remote(self, remote: RemoteFolder) -> None:
        """Delete in `remote` what was discarded here and is still there. A collective. Raises CheckpointError."""
        if self.last_kept is not None:
            last = self.last_kept
            self.runtime.on_first(lambda: delete_newer_remote(remote, last))
            self.last_kept = None

    def report(self, step: int) -> None:
        """That the checkpoint is complete."""
        if self.runtime.is_first:
            self.on_saved(step)

    def upload(self, remote: RemoteFolder, step: int) -> None:
        """Copy a complete checkpoint to `remote`. Where it fails training goes on, and the next one is copied."""
        self.upload_failure = None
        try:
            self.discard_remote(remote)
            upload_checkpoint(remote, self.folder / f"step-{step:08d}", self.retention, self.runtime)
        except CheckpointError as error:
            self.upload_failure = error
            self.report_failed_upload(step, error)

    def report_failed_upload(self, step: int, error: CheckpointError) -> None:
        if self.runtime.is_first:
            self.on_upload_failed(step, str(error))

    def finish(self) -> None:
        """Wait for a save that is in progress. Raises CheckpointError on all ranks if it failed."""
        failure = self.wait(None)
        if failure is not None:
            raise failure

    @property
    def failed(self) -> bool:
        """Whether a background save has failed; `save` and `finish` will raise its error."""
        return self.under_way is not None and self.under_way.failure is not None

    def wait(self, seconds: float | None) -> BaseException | None:
        """Wait for a save that is in progress and drop it; its error, if it failed."""
        if self.under_way is None:
            return None
        self.under_way.join(seconds)  # if this is interrupted, `under_way` is kept
        finished, self.under_way = self.under_way, None
        return finished.failure

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
            if self.upload_failure is not None:  # of the last checkpoint
                raise self.upload_failure
            return
        # The threads of all ranks communicate without the main threads, so the save can succeed after training failed.
        failure = self.wait(ERROR_TIMEOUT)
        if failure is not None and self.runtime.is_first:
            reason = failure if isinstance(failure, CheckpointError) else "another rank has ended"
            print(f"note: a checkpoint was being saved, which failed as well: {reason}", file=sys.stderr, flush=True)


class BackgroundSave(threading.Thread):
    """A thread that does the phases of a save, and forgets each of them with its arguments when it is done.

    `failure` is the error of a failed save. A daemon: Python exits without waiting for it.

    The checkpoint library waits for the stream of its thread, although the tensors are on the CPU; that must not be
    the stream of the training on `device`.
    """

    def __init__(self, phases: list[Callable[[], None]], device: torch.device) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.phases = phases
        self.device = device
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            with own_queue(self.device):
                while self.phases:
                    self.phases.pop(0)()
        except BaseException as error:  # raised by the thread that waits; the library's errors are not Exceptions
            self.failure = error
            self.phases.clear()
