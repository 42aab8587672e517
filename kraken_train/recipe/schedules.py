"""Learning-rate schedules: a linear warm-up, then a shape. One class per choice of conf/schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from kraken_train.common.errors import ConfigError
from kraken_train.common.token_counts import Tokens
from kraken_train.recipe.lengths import Length


@dataclass(frozen=True)
class ScheduleLengths:
    """The lengths of a schedule in steps, or in any unit in which the current step has the length 1."""

    warmup: float
    decay: float  # of the end, where a schedule decays there alone
    total: float


@dataclass(frozen=True)
class Schedule:
    """What all schedules share."""

    warmup_steps: int  # optimizer steps of the linear warm-up to the peak learning rate
    # tokens of the warm-up, as in 300M, in place of warmup_steps; null: warmup_steps count
    warmup_tokens: Tokens | None = field(default=None, kw_only=True)

    @property
    def warmup(self) -> Length:
        return Length("schedule.warmup_steps", self.warmup_steps, "schedule.warmup_tokens", self.warmup_tokens)

    @property
    def decay(self) -> Length | None:
        """Of the end, where it has a length of its own."""
        return None

    def validate(self) -> None:
        """Raises ConfigError."""
        self.warmup.validate(minimum=0)

    def learning_rate(self, peak: float, step: int, max_steps: int) -> float:
        """The rate of optimizer step `step` (the first is 0) in a run of `max_steps`, with lengths in steps."""
        decay = 0 if self.decay is None else self.decay.steps
        return self.rate(peak, step, ScheduleLengths(self.warmup_steps, decay, max_steps))

    def rate(self, peak: float, begin: float, lengths: ScheduleLengths) -> float:
        """The rate of the step from `begin` to `begin + 1`."""
        if begin + 1 <= lengths.warmup:
            return peak * (begin + 1) / lengths.warmup
        return self.after_warmup(peak, begin, lengths)

    def after_warmup(self, peak: float, begin: float, lengths: ScheduleLengths) -> float:
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
    """Half a cosine from the peak down to `min_ratio` of it at the end of the run."""

    name: Literal["cosine"] = "cosine"  # shape after the warm-up

    def after_warmup(self, peak: float, begin: float, lengths: ScheduleLengths) -> float:
        floor = self.min_ratio * peak
        done = max(0, begin - lengths.warmup)  # a step may begin within the warm-up and end after it
        progress = done / max(1, lengths.total - lengths.warmup)
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class WSDSchedule(DecayingSchedule):
    """Warm-up, stable, decay: the peak, then linear down to `min_ratio` of it at the end of the run."""

    decay_steps: int  # optimizer steps of the final linear decay
    # tokens of the final linear decay, as in 300M, in place of decay_steps; null: decay_steps count
    decay_tokens: Tokens | None = field(default=None, kw_only=True)
    name: Literal["wsd"] = "wsd"  # shape after the warm-up

    @property
    def decay(self) -> Length:
        return Length("schedule.decay_steps", self.decay_steps, "schedule.decay_tokens", self.decay_tokens)

    def validate(self) -> None:
        super().validate()
        self.decay.validate(minimum=1)

    def after_warmup(self, peak: float, begin: float, lengths: ScheduleLengths) -> float:
        return linear_decay(peak, self.min_ratio * peak, lengths.total - begin, lengths.decay)


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The peak until the end."""

    name: Literal["constant"] = "constant"  # shape after the warm-up

    def after_warmup(self, peak: float, begin: float, lengths: ScheduleLengths) -> float:
        return peak


def linear_decay(highest: float, lowest: float, remaining: float, length: float) -> float:
    """The rate of a step with which `remaining` begins, where the decay of this `length` ends with the run."""
    return lowest + (highest - lowest) * min(1.0, max(0, remaining) / length)


AnySchedule = CosineSchedule | WSDSchedule | ConstantSchedule
