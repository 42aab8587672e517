"""Which checkpoints of a run stay on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints.training.manifest import step_of


@dataclass(frozen=True)
class Retention:
    """The newest `keep`, milestones, and those that are younger than so many seconds."""

    keep: int
    milestone: int | None = None  # steps; the first checkpoint at or after each multiple of it stays
    seconds: float = 0.0

    def superfluous(self, folders: Sequence[Path], now: float) -> list[Path]:
        """Of the folders of checkpoints, the oldest first, those to delete at this time. Raises OSError."""
        milestones: dict[int, Path] = {}
        for folder in folders:
            multiple = step_of(folder) // self.milestone if self.milestone else 0
            if multiple:
                milestones.setdefault(multiple, folder)
        staying = {*folders[-self.keep :], *milestones.values()}
        return [folder for folder in folders if folder not in staying and now - folder.stat().st_mtime >= self.seconds]
