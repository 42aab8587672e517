"""What a copy of a run in some service does, and what all of them do alike."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import try_lock

WAIT_SECONDS = 0.5


class Copy(Protocol):
    def log(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl. Each step is shown once, however often it comes."""

    def tell(self, event: dict[str, Any], news: bool) -> None:
        """A record of events.jsonl. `news`: from the end of the start before this one on."""

    def begin_again(self) -> None:
        """metrics.jsonl was replaced, as its newest steps are done again: all of its records come once more."""

    def close(self, exit_code: int) -> None:
        """Wait until everything is written, or sent. 0: the run is finished; 143: it will be continued; 1: failed."""


def event_line(event: dict[str, Any]) -> str:
    """`2026-01-31T23:59:59.123+00:00 saved step=200`"""
    details = (f"{key}={value}" for key, value in event.items() if key not in ("time", "event") and value is not None)
    return " ".join([str(event.get("time")), str(event.get("event")), *details])


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Without its step. What was not finite is null in the file, and a gap in the curve would hide it."""
    return {name: float("nan") if value is None else value for name, value in record.items() if name != "step"}


@contextmanager
def only_writer(run_dir: Path, mode: str, wait: bool) -> Iterator[None]:
    """Keeps others from writing to the same copy, among them the follower of a start that has just been killed.

    Raises CheckpointError if there is one, unless `wait` is set.
    """
    with (run_dir / f".tracking-{mode}.lock").open("a", encoding="utf-8") as file:
        while not try_lock(file.fileno()):
            if not wait:
                raise CheckpointError(
                    f"another process follows {run_dir} with tracking.mode={mode}; wait until it has ended"
                )
            time.sleep(WAIT_SECONDS)
        yield
