"""A simulated link between ranks, which only takes time: the interface, and for the CPU a thread that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from torch.profiler import record_function

ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"
Wait = Callable[[], None]


class Link(Protocol):
    """Simulates transfers, one after the other."""

    def begin(self, collective: str, seconds: float, moved: float) -> Wait:
        """Begin a transfer concurrently with the computation; the returned function waits for its end.

        It takes so many seconds, and reads and writes `moved` bytes of memory meanwhile.
        """
        ...

    def transfer(self, collective: str, seconds: float, moved: float) -> None:
        """A transfer that the computation waits for."""
        ...


class ThreadLink:
    """On the CPU: a thread that sleeps. The profiler sees it as `all_reduce_wire` and `all_gather_wire`."""

    def __init__(self) -> None:
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="link")
        self.free_at = 0.0  # in the time of perf_counter

    def begin(self, collective: str, seconds: float, moved: float) -> Wait:
        # The end is fixed here, so that delays of the thread's start and of its sleep do not accumulate.
        self.free_at = max(time.perf_counter(), self.free_at) + seconds
        return self.worker.submit(occupy_until, self.free_at, f"{collective}_wire").result

    def transfer(self, collective: str, seconds: float, moved: float) -> None:
        self.begin(collective, seconds, moved)()


def occupy_until(moment: float, name: str) -> None:
    with record_function(name):
        time.sleep(max(0.0, moment - time.perf_counter()))
