"""What each rank writes to the store of the process group for the watchdog, and reads there of other ranks.

The store's keys are

    heartbeat/RANK  the rank's Heartbeat, written every few seconds
    place/RANK      the rank's Place, written once some rank has reported a stall
    stalled         number of ranks that have written a Place
    failure         the JobFailure by which the job is being ended
    left            number of ranks that have left the watchdog
"""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from kraken_train.health.stack_dump import Place

RUNNING, DONE, FAILED = "running", "done", "failed"


@dataclass(frozen=True)
class Heartbeat:
    """State of one rank's process."""

    rank: int
    pid: int
    host: str
    started: float  # start time of the process, in seconds since the epoch on its machine
    count: int  # heartbeats so far
    step: int | None  # the last completed one; None before the first
    state: str  # RUNNING, DONE or FAILED

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def kill(self) -> None:
        """Kill the process with SIGKILL, if it is on this machine and still exists.

        No other signal ends a stopped process.
        """
        if self.host != socket.gethostname() or self.pid == os.getpid():
            return
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 2:  # otherwise another process has this process ID now
                process.send_signal(signal.SIGKILL)
        except psutil.Error:
            pass


@dataclass(frozen=True)
class JobFailure:
    """Why the watchdog ends the job."""

    message: str
    culprit: Heartbeat | None  # the process to kill
    ranks: tuple[int, ...]  # ranks that record this as their own failure; the other ranks end because of them


class HeartbeatStore:
    """Typed access to the keys above. Each method makes at most two requests to the store.

    Raises RuntimeError (`torch.distributed.DistError`) once the store is gone.
    """

    def __init__(self, store: dist.Store, timeout_seconds: float) -> None:
        # A connection of its own: a connection is locked while a thread waits in it.
        self.store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self.store.set_timeout(timedelta(seconds=timeout_seconds))

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        self.store.set(f"heartbeat/{heartbeat.rank}", encode(heartbeat))

    def read_heartbeat(self, rank: int) -> Heartbeat | None:
        fields = self.read(f"heartbeat/{rank}")
        return None if fields is None else Heartbeat(**fields)

    def is_done(self, rank: int) -> bool:
        """Whether the rank has completed its run."""
        heartbeat = self.read_heartbeat(rank)
        return heartbeat is not None and heartbeat.state == DONE

    def write_place(self, place: Place) -> bool:
        """Write where this rank is; return whether it is the first rank to do so."""
        self.store.set(f"place/{place.rank}", encode(place))
        return self.store.add("stalled", 1) == 1

    def read_place(self, rank: int) -> Place | None:
        fields = self.read(f"place/{rank}")
        return None if fields is None else Place(**fields)

    def stall_reported(self) -> bool:
        """Whether some rank has written where it is, so that all ranks must."""
        return self.store.check(["stalled"])

    def write_failure(self, failure: JobFailure) -> None:
        self.store.set("failure", encode(failure))

    def read_failure(self) -> JobFailure | None:
        fields = self.read("failure")
        if fields is None:
            return None
        culprit = fields["culprit"]
        return JobFailure(fields["message"], None if culprit is None else Heartbeat(**culprit), tuple(fields["ranks"]))

    def count_left(self, leaving: int = 0) -> int:
        """Add `leaving` to the number of ranks that have left, and return it."""
        return self.store.add("left", leaving)

    def read(self, key: str) -> dict[str, Any] | None:
        """The value of `key`; None if it is not set (`get` alone would wait for it)."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None


def encode(value: Heartbeat | Place | JobFailure) -> str:
    return json.dumps(asdict(value))
