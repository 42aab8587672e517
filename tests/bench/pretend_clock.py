"""A clock on which simulated transfers take the time that is set, computation what a test says, and nothing else any
time: what the figures are on a machine that is infinitely fast, whatever the real one does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kraken_train.bench import link, timing


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        """Really as well, for a profile."""
        time.sleep(seconds)
        self.seconds += seconds


class Worker:
    """In place of a thread that sleeps: it ends its sleep when it is waited for, and the clock went on meanwhile."""

    def __init__(self, **options: Any) -> None:
        pass

    def submit(self, function: Callable[..., None], *arguments: Any) -> Transfer:
        return Transfer(function, arguments)


@dataclass
class Transfer:
    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def result(self) -> None:
        self.function(*self.arguments)


def pretend(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all that is timed from now on."""
    clock = Clock()
    for module in (link, timing):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(link, "ThreadPoolExecutor", Worker)
    return clock
