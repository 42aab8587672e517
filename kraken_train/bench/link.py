"""A link between ranks on which only time passes: the interface, and a thread that sleeps, for the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from torch.profiler import record_function

ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"
Wait = Callable[[], None]


class Link(Protocol):
    """What lets the time of a transfer pass; one transfer after the other."""

    def begin(self, collective: str, seconds: float) -> Wait:
        """Begin a transfer beside the computation; calling what this returns waits for its end."""
        ...

    def transfer(self, collective: str, seconds: float) -> None:
        """A transfer that the computation waits for."""
        ...


class ThreadLink:
    """On the CPU: a thread that sleeps. The profiler sees it as `all_reduce_wire` and `all_gather_wire`."""

    def __init__(self) -> None:
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="link")
        self.free_at = 0.0  # in the time of perf_counter

    def begin(self, collective: str, seconds: float) -> Wait:
        # The end is fixed here, so that neither the thread's start nor a sleep that lasts too long adds up.
        self.free_at = max(time.perf_counter(), self.free_at) + seconds
        return self.worker.submit(occupy_until, self.free_at, f"{collective}_wire").result

    def transfer(self, collective: str, seconds: float) -> None:
        self.begin(collective, seconds)()


def occupy_until(moment: float, name: str) -> None:
    with record_function(name):
        time.sleep(max(0.0, moment - time.perf_counter()))
