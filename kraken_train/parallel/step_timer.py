"""The time of a step by phase: each phase marks its begin and its end, and the marks become seconds.

On a GPU the marks are CUDA events on the stream of the computation; only `StepTimer.take` waits for them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DATA = "data"  # waiting for the next batch
FORWARD = "forward"
BACKWARD = "backward"
EXCHANGE = "exchange"  # waiting for an all-reduce of a model copy: the exposed communication
REDUCTION = "reduction"  # of gradients over the copies
OPTIMIZER = "optimizer"
OTHER = "other"  # between phases


class StepTimer:
    """Seconds by phase, measured only while `active`.

    Phases nest, and time counts for the innermost one only: while the forward pass waits for an all-reduce, that is
    `EXCHANGE` and not `FORWARD`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.active = False
        self.open: list[str] = []
        self.marks: list[tuple[float | torch.cuda.Event, str]] = []  # (time, phase that begins then)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time within counts for the phase `name`, in whichever thread it is."""
        if not self.active:
            yield
            return
        self.open.append(name)
        self.mark()
        try:
            yield
        finally:
            self.open.pop()
            self.mark()

    def mark(self) -> None:
        self.marks.append((self.now(), self.open[-1] if self.open else OTHER))

    def now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. On a GPU it waits for the last mark."""
        marks, self.marks = self.marks, []
        if self.device.type == "cuda" and marks:
            marks[-1][0].synchronize()  # type: ignore[union-attr]
        seconds: dict[str, float] = {}
        for (begin, name), (end, _) in itertools.pairwise(marks):
            seconds[name] = seconds.get(name, 0.0) + between(begin, end)
        return seconds


def between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event):
        milliseconds: float = begin.elapsed_time(end)  # type: ignore[arg-type]
        return milliseconds / 1e3
    return float(end) - begin  # type: ignore[arg-type]
