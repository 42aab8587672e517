"""A run and its checkpoints in object storage (`checkpoint.remote_dir`), at its start."""

from __future__ import annotations

from pathlib import Path

from checkpoints.training.manifest import has_checkpoints
from checkpoints.training.remote import RemoteFolder, download_newest, require_same_run
from kraken_train.config import TrainConfig
from kraken_train.run.folder import locked, read_identity, system_errors
from kraken_train.training.open_run import may_precede_a_run


def remote_folder(config: TrainConfig) -> RemoteFolder | None:
    url = config.checkpoint.remote_dir
    return None if url is None else RemoteFolder(url.rstrip("/"))


def fetch_remote_checkpoint(config: TrainConfig) -> None:
    """On one rank: copy the newest checkpoint from there to a run's folder that has none, unless `resume=never`.

    Before the folder is opened, which then continues this run. Raises CheckpointError, and ConfigError for a URL that
    cannot be used, also where nothing needs to be copied: before any work is lost.
    """
    remote, path = remote_folder(config), Path(config.run_dir)
    if remote is None:
        return
    remote.require_writable()
    if config.resume == "never" or has_checkpoints(path / "checkpoints") or not remote.steps():
        return
    with system_errors(f"run_dir={path} cannot be written"):
        identity = read_identity(path)
        if identity is not None:
            require_same_run(remote, identity["id"])
        elif path.exists() and any(not may_precede_a_run(entry) for entry in path.iterdir()):
            return  # no folder for a run, which `open_run_folder` says
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            download_newest(remote, path / "checkpoints", lambda line: print(line, flush=True))


def require_own_remote(config: TrainConfig, run_id: str) -> None:
    """Raises CheckpointError where the URL has checkpoints of another run."""
    remote = remote_folder(config)
    if remote is not None:
        require_same_run(remote, run_id)
