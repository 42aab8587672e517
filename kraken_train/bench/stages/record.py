"""What is left of a stage: OUTPUT_DIR/NAME.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kraken_train.bench.stages.stage import Figures
from kraken_train.common.files import replace_synced

DONE, FAILED, TIMED_OUT = "done", "failed", "timed out"


@dataclass(frozen=True)
class Record:
    stage: str
    status: str  # DONE, FAILED or TIMED_OUT
    seconds: float
    commands: tuple[str, ...]
    figures: Figures
    message: str  # the end of the output of what has failed
    device: str
    time: str  # of its end, UTC

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_synced(path_of(folder, self.stage), json.dumps(asdict(self), indent=2) + "\n")


def path_of(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.json"


def read_record(folder: Path, stage: str) -> Record | None:
    """None where there is none, or one that was written by another version."""
    try:
        stored = json.loads(path_of(folder, stage).read_text(encoding="utf-8"))
        return Record(**{**stored, "commands": tuple(stored["commands"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
