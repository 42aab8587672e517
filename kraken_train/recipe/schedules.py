"""Learning-rate schedules: a linear warm-up, then a shape. One class per choice of conf/schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least


@dataclass(frozen=True)
class Schedule:
    """What all schedules share."""

    warmup_steps: int  # optimizer steps of the linear warm-up to the peak learning rate

    def validate(self) -> None:
        """Raises ConfigError."""
        require_at_least("schedule.warmup_steps", self.warmup_steps, 0)

    def require_fits(self, max_steps: int) -> None:
        """Raises ConfigError if a run of `max_steps` is too short for the schedule."""

    def learning_rate(self, peak: float, step: int, max_steps: int) -> float:
        """The rate of optimizer step `step` (the first is 0) in a run of `max_steps`."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        return self.after_warmup(peak, step, max_steps)

    def after_warmup(self, peak: float, step: int, max_steps: int) -> float:
        raise TypeError(f"{type(self).__name__} does not define after_warmup()")


@dataclass(frozen=True)
class DecayingSchedule(Schedule):
    min_ratio: float  # last learning rate, as a fraction of the peak

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"schedule.min_ratio={self.min_ratio} must be between 0 and 1")


@dataclass(frozen=True)
class CosineSchedule(DecayingSchedule):
    """Half a cosine from the peak down to `min_ratio` of it at the last step."""

    name: Literal["cosine"] = "cosine"  # shape after the warm-up

    def after_warmup(self, peak: float, step: int, max_steps: int) -> float:
        floor = self.min_ratio * peak
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class WSDSchedule(DecayingSchedule):
    """Warm-up, stable, decay: the peak, then linear down to `min_ratio` of it over the last `decay_steps`."""

    decay_steps: int  # optimizer steps of the final linear decay
    name: Literal["wsd"] = "wsd"  # shape after the warm-up

    def validate(self) -> None:
        super().validate()
        require_at_least("schedule.decay_steps", self.decay_steps, 1)

    def require_fits(self, max_steps: int) -> None:
        if self.warmup_steps + self.decay_steps > max_steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.decay_steps={self.decay_steps} together are "
                f"more than max_steps={max_steps}; lower them"
            )

    def after_warmup(self, peak: float, step: int, max_steps: int) -> float:
        floor = self.min_ratio * peak
        remaining = max(0, max_steps - step)
        return floor + (peak - floor) * min(1.0, remaining / self.decay_steps)


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The peak until the end."""

    name: Literal["constant"] = "constant"  # shape after the warm-up

    def after_warmup(self, peak: float, step: int, max_steps: int) -> float:
        return peak


AnySchedule = CosineSchedule | WSDSchedule | ConstantSchedule
