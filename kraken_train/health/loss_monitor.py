"""Detects losses that are not finite and loss spikes.

A loss is suspicious if it is above

    median + spike_factor * max(median absolute deviation, SMALLEST_DEVIATION * median)

of the last `spike_window` losses that were not suspicious, once there are so many. `spike_steps` suspicious losses in a
row are a spike. A phase of the run begins without losses to compare with. The loss of a step is computed before its
update, so it evaluates the weights after the previous step: a checkpoint is known to be good once the loss of the next
step is good.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kraken_train.settings.health import HealthConfig

SMALLEST_DEVIATION = 0.01  # of the median: when the loss hardly changes, small changes must not count as spikes


@dataclass(frozen=True)
class Trouble:
    """A series of losses that are not finite, or a spike."""

    first: int  # its first step
    last: int  # its last step so far
    spike: bool  # False: not finite
    reason: str  # for messages


class LossMonitor:
    """Watches the losses of one start of a run. All ranks see the same losses and come to the same conclusions.

    `recent` are the losses of the window. Checkpoints keep them, so that a resumed run detects the same spikes as one
    that was never interrupted.
    """

    def __init__(self, health: HealthConfig, max_nonfinite_steps: int) -> None:
        self.health = health
        self.max_nonfinite_steps = max_nonfinite_steps
        self.recent: deque[float] = deque(maxlen=health.spike_window)
        self.phase = 0  # of the run, whose losses these are
        self.skipped = 0  # in a row
        self.suspicious = 0  # in a row; skipped steps between them are not counted
        self.first = 0  # the first step of the current trouble
        self.furthest = 0  # the last step of any trouble
        self.rollbacks = 0  # since the last good step after `furthest`

    @property
    def calm(self) -> bool:
        """Whether the last step was neither skipped nor suspicious; otherwise the weights must not be saved."""
        return not self.skipped and not self.suspicious

    def observe(self, step: int, loss: float, applied: bool, last: bool = False) -> Trouble | None:
        """Add a completed step; return the trouble once it is certain. After the `last` step it is certain at once."""
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

    def enter(self, phase: int) -> None:
        """The next step is of this phase. Losses of another one, with other data, do not say what is usual in it."""
        if phase != self.phase:
            self.phase, self.suspicious = phase, 0
            self.recent.clear()

    def is_suspicious(self, loss: float) -> bool:
        health = self.health
        if health.loss_spike == "ignore" or len(self.recent) < health.spike_window:
            return False
        median = statistics.median(self.recent)
        deviation = statistics.median(abs(value - median) for value in self.recent)
        return loss > median + health.spike_factor * max(deviation, SMALLEST_DEVIATION * median)

    def continue_from(self, recent: Iterable[float], phase: int = 0) -> None:
        """Continue from a checkpoint with these recent losses, of a phase of the run."""
        self.phase = phase
        self.recent.clear()
        self.recent.extend(recent)
        self.skipped = self.suspicious = 0

    def wants_rollback(self, trouble: Trouble) -> bool:
        return (self.health.loss_spike if trouble.spike else self.health.nonfinite) == "rollback"

    def may_roll_back(self) -> bool:
        """Count a rollback; False if it exceeds `max_rollbacks`."""
        self.rollbacks += 1
        return self.rollbacks <= self.health.max_rollbacks


def steps(first: int, last: int) -> str:
    return f"steps {first} to {last}" if first < last else f"step {first}"
