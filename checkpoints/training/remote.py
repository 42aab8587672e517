"""Checkpoints in object storage: finished ones are copied to a URL of fsspec, and a new machine begins with the newest.

URL/step-NNNNNNNN/ has the same files as the folder of that name in the run's `checkpoints/`. Object storage cannot
rename, so a checkpoint is complete when its manifest is there: that is uploaded last and deleted first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec

from checkpoints.training.manifest import MANIFEST, STEP_FOLDER, Checkpoint, read_manifest
from checkpoints.training.retention import Retention
from checkpoints.training.store import find_problem
from checkpoints.training.writer import WrittenPart, make_empty, publish, unfinished
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.parallel.ranks import Runtime

PROBE = ".writable"


@dataclass(frozen=True)
class RemoteFolder:
    """The checkpoints of a run at a URL, such as s3://bucket/run. Each method raises CheckpointError."""

    url: str

    @cached_property
    def filesystem(self) -> Any:
        """Of fsspec. Raises ConfigError for a URL that it does not know, or whose package is not installed."""
        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except Exception as error:  # each package has its own
            raise ConfigError(
                f"checkpoint.remote_dir={self.url} cannot be used: {error}; give a URL such as s3://bucket/run or "
                "gs://bucket/run, and install kraken-train[remote]"
            ) from error

    @cached_property
    def root(self) -> str:
        """The path of the URL in `filesystem`."""
        return str(self.filesystem._strip_protocol(self.url)).rstrip("/")

    @contextmanager
    def errors(self, problem: str) -> Iterator[None]:
        """The libraries that fsspec uses raise errors of their own kinds."""
        try:
            yield
        except (CheckpointError, ConfigError):
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = text[0] if text else type(error).__name__
            raise CheckpointError(f"checkpoint.remote_dir={self.url} {problem}: {reason}") from error

    def require_writable(self) -> None:
        """Write and delete a small file."""
        with self.errors("cannot be written to"):
            self.make_folder(self.root)
            self.filesystem.pipe_file(f"{self.root}/{PROBE}", b"")
            self.filesystem.rm_file(f"{self.root}/{PROBE}")

    def make_folder(self, path: str) -> None:
        """Where there are folders at all. For object storage fsspec would make a bucket of a misspelt name."""
        if isinstance(self.filesystem, fsspec.get_filesystem_class("file")):
            self.filesystem.makedirs(path, exist_ok=True)

    def steps(self) -> dict[int, float]:
        """Of each complete checkpoint, the time at which it was written, in seconds; the oldest step first."""
        with self.errors("cannot be read"):
            self.filesystem.invalidate_cache()
            if not self.filesystem.isdir(self.root):
                return {}
            names = [entry.rstrip("/").rpartition("/")[2] for entry in self.filesystem.ls(self.root, detail=False)]
            manifests = {
                int(match.group(1)): f"{self.root}/{match.group()}/{MANIFEST}"
                for match in map(STEP_FOLDER.fullmatch, sorted(names))
                if match is not None
            }
            return {
                step: self.filesystem.modified(path).timestamp()
                for step, path in manifests.items()
                if self.filesystem.isfile(path)
            }

    def upload_file(self, path: Path) -> None:
        """A file of a checkpoint."""
        with self.errors(f"cannot be written to: {path.parent.name}/{path.name}"):
            self.make_folder(f"{self.root}/{path.parent.name}")
            self.filesystem.put_file(str(path), f"{self.root}/{path.parent.name}/{path.name}")

    def download_file(self, step: int, name: str, target: Path) -> None:
        with self.errors(f"cannot be read: step-{step:08d}/{name}"):
            self.filesystem.get_file(f"{self.root}/step-{step:08d}/{name}", str(target))

    def delete(self, step: int) -> None:
        """Whatever there is of a checkpoint."""
        folder = f"{self.root}/step-{step:08d}"
        with self.errors(f"cannot be written to: step-{step:08d}"):
            self.filesystem.invalidate_cache()
            if self.filesystem.isfile(f"{folder}/{MANIFEST}"):
                self.filesystem.rm_file(f"{folder}/{MANIFEST}")
            if self.filesystem.isdir(folder):
                self.filesystem.rm(folder, recursive=True)


def upload_checkpoint(remote: RemoteFolder, path: Path, retention: Retention, runtime: Runtime) -> None:
    """Copy a complete checkpoint there, then delete what `retention` does not keep. A collective.

    Each rank uploads a share of the files. Raises CheckpointError with the same message on all ranks.
    """
    checkpoint = runtime.on_first(lambda: read_manifest(path))
    runtime.on_first(lambda: remote.delete(checkpoint.step))  # what an interrupted upload, or one of old, has left
    failures = runtime.gather(upload_share(remote, checkpoint, runtime))
    for failure in filter(None, failures):
        raise CheckpointError(f"{path} is complete, but could not be copied: {failure}")

    def complete() -> None:
        remote.upload_file(path / MANIFEST)
        for step in retention.superfluous_steps(remote.steps(), time.time()):
            remote.delete(step)

    runtime.on_first(complete)


def upload_share(remote: RemoteFolder, checkpoint: Checkpoint, runtime: Runtime) -> str | None:
    """Why this rank could not upload its share; None: it could."""
    try:
        for name in list(checkpoint.files)[runtime.rank :: runtime.world_size]:
            remote.upload_file(checkpoint.path / name)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return None


def delete_newer_remote(remote: RemoteFolder, step: int) -> None:
    """Delete the checkpoints of later steps, which the run will repeat."""
    for later in remote.steps():
        if later > step:
            remote.delete(later)


def require_same_run(remote: RemoteFolder, run_id: str) -> None:
    """Raises CheckpointError if the URL has checkpoints of another run."""
    steps = remote.steps()
    if not steps:
        return
    with TemporaryDirectory() as folder:
        remote.download_file(max(steps), MANIFEST, Path(folder) / MANIFEST)
        found = read_manifest(Path(folder)).metadata.get("run_id")
    if found != run_id:
        raise CheckpointError(
            f"checkpoint.remote_dir={remote.url} holds the checkpoints of run {found}, and this is run {run_id}; use "
            "another URL for this run, or the run_dir of that one"
        )


def download_newest(remote: RemoteFolder, folder: Path, print_line: Callable[[str], None]) -> None:
    """Copy the newest good checkpoint at the URL, if there is one, to `folder`, the `checkpoints/` of a run.

    On one rank. `print_line` gets what deserves a line on the console. Raises CheckpointError, also if all are damaged.
    """
    problems: list[str] = []
    for step in reversed(remote.steps()):
        problem = download(remote, step, folder)
        if problem is None:
            print_line(f"copied the checkpoint of step {step} from {remote.url}")
            return
        problems.append(problem)
        print_line(f"passed over a damaged checkpoint of {remote.url}: {problem}")
    if problems:
        raise CheckpointError(f"every checkpoint of checkpoint.remote_dir={remote.url} is damaged; use another URL")


def download(remote: RemoteFolder, step: int, folder: Path) -> str | None:
    """Copy a checkpoint to `folder`. Returns why it is damaged, if it is."""
    temporary = unfinished(folder, step)
    make_empty(temporary)
    remote.download_file(step, MANIFEST, temporary / MANIFEST)
    try:
        checkpoint = read_manifest(temporary)
    except CheckpointError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        return str(error)
    (temporary / MANIFEST).unlink()  # it is written anew, last
    for name in checkpoint.files:
        remote.download_file(step, name, temporary / name)
    problems = (find_problem(temporary / name, entry) for name, entry in checkpoint.files.items())
    problem = next(filter(None, problems), None)
    if problem is not None:
        shutil.rmtree(temporary, ignore_errors=True)
        return problem
    publish(folder, temporary, step, checkpoint.metadata, [WrittenPart(checkpoint.files, None)])
    return None
