"""The interface of a tracker, which shows a run in a service, and what all of them share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import try_lock

WAIT_SECONDS = 0.5


class TrackerBackend(Protocol):
    def log(self, record: dict[str, Any]) -> None:
        """Show a record of metrics.jsonl; each step once, even if it is repeated."""

    def log_event(self, event: dict[str, Any], news: bool) -> None:
        """Show a record of events.jsonl; `news`: it is not older than the end of the previous start."""

    def restart(self) -> None:
        """Begin anew: metrics.jsonl was replaced, because its newest steps are repeated; all records follow again."""

    def close(self, exit_code: int) -> None:
        """Wait until everything is written, or sent. 0: the run is finished; 143: it will be continued; 1: failed."""


def event_line(event: dict[str, Any]) -> str:
    """`2026-01-31T23:59:59.123+00:00 saved step=200`"""
    details = (f"{key}={value}" for key, value in event.items() if key not in ("time", "event") and value is not None)
    return " ".join([str(event.get("time")), str(event.get("event")), *details])


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The values of a record without its step. Non-finite values are null in the file; nan shows them in the curve."""
    return {name: float("nan") if value is None else value for name, value in record.items() if name != "step"}


@contextmanager
def only_writer(run_dir: Path, mode: str, wait: bool) -> Iterator[None]:
    """Excludes other processes that write the same run to the service, such as the follower of a killed start.

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
