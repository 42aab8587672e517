"""The events of a run: RUN_DIR/events.jsonl, a JSON object per line with `time`, `event` and its details.

    submitted   a job was handed to Slurm: job
    allocated   Slurm has given a job its nodes, and its ranks are being started: job, requeues, nodes (their names),
                earlier_starts (their number)
    started     a start began, from `step`: start, world_size, and under Slurm job, requeues
    saved       a checkpoint is complete: step
    upload_failed
                it could not be copied to checkpoint.remote_dir: step, reason
    skipped     a step changed no weight, since its loss or a gradient was not finite: step
    straggler   a rank needs `factor` times as long as the median one for its own part of a step: step, rank, host,
                factor; `straggler_over` when it no longer does
    rolled_back the run continues from its checkpoint of `to_step`, with the data after `step`: step, to_step, reason,
                skipped_samples
    stopping    a request to save and end has arrived: step, reason
    ended       a start is over: start, step, outcome (one of OUTCOMES), reason
    tracking    Weights & Biases or TensorBoard lacks something: note
    requeued    the job goes back to Slurm's queue, to continue: job, reason

A start that was killed has no `ended`. Rank 0 writes during a start, and the batch script between two starts, so there
is one writer.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import UnionType
from typing import Any

from kraken_train.common.files import read_file
from kraken_train.common.parsing import find_wrong_type, parse_mapping

FINISHED, INTERRUPTED, FAILED = OUTCOMES = "finished", "interrupted", "failed"

Event = dict[str, Any]
TYPES: dict[str, type | UnionType] = {  # of the details, as far as they are used
    "time": str,
    "event": str,
    "job": str | int | None,
    "reason": str | None,
    "note": str | None,
    "outcome": str,
    "start": int,
    "step": int | None,
    "earlier_starts": int,
    "last_step": int | None,
    "last_tokens": int | None,
}


class EventLog:
    """Appends events to a file. Warns once when the disk is full, and does not stop the run for that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.complained = False

    def write(self, event: str, **details: Any) -> None:
        line = json.dumps({"time": now(), "event": event, **details}) + "\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self.complained:
                print(f"note: {self.path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
            self.complained = True


def read_events(path: Path) -> list[Event]:
    """All events, the oldest first; none if there is no file. A line that was cut short or damaged is left out."""
    try:
        lines = read_file(path).splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = parse_mapping(line)
            datetime.fromisoformat(event["time"]).astimezone()
        except (KeyError, OverflowError, TypeError, ValueError):
            continue
        if event.get("outcome", FINISHED) not in OUTCOMES:
            continue
        if "event" in event and find_wrong_type(event, TYPES) is None:
            events.append(event)
    return events


def now() -> str:
    """2026-01-31T23:59:59.123+00:00: one clock for all machines of a run."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
