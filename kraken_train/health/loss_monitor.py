"""Whether the loss is what it should be: steps that are not finite, and spikes.

A loss is suspicious if it is above

    median + spike_factor * max(median absolute deviation, SMALLEST_DEVIATION * median)

of the last `spike_window` losses that were not, once there are so many; `spike_steps` such losses in a row are a spike.
The loss of a step is computed before its update, so it tells of the weights that the step before has left: a
checkpoint is known to be good once the loss of the step after it is.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kraken_train.config import HealthConfig

SMALLEST_DEVIATION = 0.01  # of the median: a loss that hardly moves is no reason to call every movement a spike


@dataclass(frozen=True)
class Trouble:
    first: int  # the step with which it began
    last: int  # so far
    spike: bool  # False: not finite
    reason: str  # for people


class LossMonitor:
    """Watches the losses of one start of a run. All ranks see the same losses and come to the same conclusions.

    `recent` are the losses of the window; kept in a checkpoint, they let a run that resumes judge like one that was
    never interrupted.
    """

    def __init__(self, health: HealthConfig, max_nonfinite_steps: int) -> None:
        self.health = health
        self.max_nonfinite_steps = max_nonfinite_steps
        self.recent: deque[float] = deque(maxlen=health.spike_window)
        self.skipped = 0  # in a row
        self.suspicious = 0  # in a row, those that were skipped between them not counted
        self.first = 0  # the step with which the present trouble began
        self.furthest = 0  # the last step of any trouble
        self.rollbacks = 0  # since a step beyond it

    @property
    def calm(self) -> bool:
        """Whether the last step gave no reason to doubt the weights; else they are not to be saved."""
        return not self.skipped and not self.suspicious

    def observe(self, step: int, loss: float, applied: bool, last: bool = False) -> Trouble | None:
        """Judge a completed step; after the `last` one there is no waiting for another."""
        if applied and not self.is_suspicious(loss):
            self.recent.append(loss)
            self.skipped = self.suspicious = 0
            if step > self.furthest:
                self.rollbacks = 0
            return None
        if self.calm:
            self.first = step
        if applied:
            self.suspicious, self.skipped = self.suspicious + 1, 0
        else:
            self.skipped += 1
        if self.skipped and (last or self.skipped >= self.max_nonfinite_steps):
            reason = f"the loss or a gradient was not finite in {steps(step - self.skipped + 1, step)}"
        elif self.suspicious and (last or self.suspicious >= self.health.spike_steps):
            usual = statistics.median(self.recent)
            reason = (
                f"the loss was {loss:.4f} in step {step}, after a median of {usual:.4f}, high from step {self.first} on"
            )
        else:
            return None
        self.furthest = max(self.furthest, step)
        return Trouble(self.first, step, not self.skipped, reason)

    def is_suspicious(self, loss: float) -> bool:
        health = self.health
        if health.loss_spike == "ignore" or len(self.recent) < health.spike_window:
            return False
        median = statistics.median(self.recent)
        deviation = statistics.median(abs(value - median) for value in self.recent)
        return loss > median + health.spike_factor * max(deviation, SMALLEST_DEVIATION * median)

    def continue_from(self, recent: Iterable[float]) -> None:
        """The run continues from a checkpoint with these recent losses."""
        self.recent.clear()
        self.recent.extend(recent)
        self.skipped = self.suspicious = 0

    def wants_rollback(self, trouble: Trouble) -> bool:
        return (self.health.loss_spike if trouble.spike else self.health.nonfinite) == "rollback"

    def may_roll_back(self) -> bool:
        """Count a rollback; False if that is one too many."""
        self.rollbacks += 1
        return self.rollbacks <= self.health.max_rollbacks


def steps(first: int, last: int) -> str:
    return f"steps {first} to {last}" if first < last else f"step {first}"
