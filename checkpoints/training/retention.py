"""Which checkpoints of a run stay on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        steps = self.superfluous_steps({step_of(folder): folder.stat().st_mtime for folder in folders}, now)
        return [folder for folder in folders if step_of(folder) in steps]

    def superfluous_steps(self, written: Mapping[int, float], now: float) -> set[int]:
        """The same of their steps, by the time at which each was written, in seconds."""
        milestones: dict[int, int] = {}
        for step in sorted(written):
            multiple = step // self.milestone if self.milestone else 0
            if multiple:
                milestones.setdefault(multiple, step)
        staying = {*sorted(written)[-self.keep :], *milestones.values()}
        return {step for step, time in written.items() if step not in staying and now - time >= self.seconds}
