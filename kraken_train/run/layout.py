"""The names of the files in a run's folder, which `kraken_train.run.folder` describes. Imports no torch."""

from __future__ import annotations

from pathlib import Path

IDENTITY_FILE = "run.json"
CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
LOCK_FILE = ".lock"
LOCK_TOUCH_SECONDS = 10.0  # between touches of the lock's file, while a start is alive
ENVIRONMENT_FILE, LOGS, ERRORS = "environment.json", "logs", "errors"  # in the folder of a start
PROFILES = "profiles"  # too
PROFILE_REQUEST = "profile"  # written by the user
LAUNCH_COMMAND = "KRAKEN_LAUNCH_COMMAND"  # environment variable: the command line of launch.deepspeed


def start_folders(path: Path) -> list[Path]:
    """The folders of the starts of the run in `path`, the oldest first."""
    return sorted(folder for folder in (path / "starts").glob("*") if folder.name.isdecimal())
