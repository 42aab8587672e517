"""The optimizer steps of a run: the size of each, its learning rate, and which is the last; all from the settings."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import from_dict
from kraken_train.common.token_counts import format_tokens
from kraken_train.recipe.batch_ramp import START, BatchRamp, Position, Step, parse_batch_size
from kraken_train.recipe.lengths import Length
from kraken_train.recipe.phases import Phase, decay_of, recorded_phases, run_length
from kraken_train.recipe.schedules import AnySchedule, Schedule, ScheduleLengths, linear_decay


class StepPlan:
    """What step comes next at any position of a run, whichever settings have led there.

    The learning rate follows the steps where all lengths are in steps, and else the tokens: lengths in steps are then
    converted to the tokens that a run with these settings has after so many steps.
    """

    def __init__(self, length: Length, schedule: Schedule, ramp: BatchRamp, phases: Sequence[Phase] = ()) -> None:
        self.length = length
        self.schedule = schedule
        self.ramp = ramp
        self.phase_begins = [0, *(phase.until for phase in phases[:-1])]  # tokens before each phase
        self.decay = decay_of(phases)  # of the last phases
        lengths = [length, schedule.warmup] + ([schedule.decay] if schedule.decay is not None else [])
        self.by_tokens = any(one.tokens is not None for one in lengths)
        self.lengths = self.lengths_in_tokens() if self.by_tokens else self.lengths_in_steps()

    def require_fits(self) -> None:
        """Raises ConfigError where the run is too short for its schedule, or where its last phases cannot decay."""
        schedule, lengths = self.schedule, self.lengths
        end = str(self.length) if self.decay is None else f"the {format_tokens(self.decay.begin)} before the decay"
        if schedule.decay is not None and lengths.warmup + lengths.decay > lengths.total:
            raise ConfigError(f"{schedule.warmup} and {schedule.decay} together are more than {end}; lower them")
        if self.decay is None:
            return
        if lengths.warmup > lengths.total:
            raise ConfigError(f"{schedule.warmup} is more than {end} of the last phases; lower it")
        if not schedule.rate(1.0, lengths.total, lengths):
            raise ConfigError(
                f"phases: the last ones decay from a learning rate of 0, to which the schedule has come after "
                f"{format_tokens(self.decay.begin)} tokens; use schedule=constant, or a schedule.min_ratio above 0"
            )

    def lengths_in_steps(self) -> ScheduleLengths:
        decay = 0 if self.schedule.decay is None else self.schedule.decay.steps
        return ScheduleLengths(self.schedule.warmup.steps, decay, self.length.steps)

    def lengths_in_tokens(self) -> ScheduleLengths:
        warmup, decay = self.schedule.warmup, self.schedule.decay
        end = self.end(START)
        total = end.tokens if self.length.tokens is None else self.length.tokens
        if self.decay is not None:  # the schedule is over where the last phases decay
            total = self.decay.begin
            end = self.ramp.reaching(total)
        of_decay: float = 0
        if decay is not None and decay.tokens is not None:
            of_decay = decay.tokens
        elif decay is not None:
            first = end.step - decay.steps
            of_decay = total - self.ramp.after_steps(first).tokens if first >= 0 else math.inf
        of_warmup = self.ramp.after_steps(warmup.steps).tokens if warmup.tokens is None else warmup.tokens
        return ScheduleLengths(of_warmup, of_decay, total)

    def phase_at(self, position: Position) -> int:
        """Number of the phase, from 0, of the step that begins at `position`; the last one has no end here."""
        return bisect_right(self.phase_begins, position.tokens) - 1

    @property
    def ends_within_warmup(self) -> bool:
        return self.lengths.total < self.lengths.warmup

    def step_at(self, position: Position) -> Step:
        return self.ramp.step_at(position)

    def end(self, position: Position) -> Position:
        """Where a run that is at `position` will end: there, where it has done all."""
        if self.length.tokens is not None:
            return self.ramp.reaching(self.length.tokens, position)
        return self.ramp.after_steps(self.length.steps, position)

    def is_beyond(self, position: Position) -> bool:
        """Whether a run at `position` has surely done a step more than the length asks for."""
        if self.length.tokens is None:
            return position.step > self.length.steps
        return position.tokens >= self.length.tokens + max(self.ramp.sizes.values()) * self.ramp.context_length

    def learning_rate(self, peak: float, position: Position) -> float:
        """Of the step that begins at `position`."""
        if not self.by_tokens:
            return self.schedule.rate(peak, position.step, self.lengths)
        # The tokens of the current step are the unit of length, so that equal sizes give the rates of equal steps.
        unit = self.step_at(position).tokens
        lengths = ScheduleLengths(self.lengths.warmup / unit, self.lengths.decay / unit, self.lengths.total / unit)
        begin = position.tokens / unit
        if self.decay is None or position.tokens < self.decay.begin:
            return self.schedule.rate(peak, begin, lengths)
        highest = self.schedule.rate(peak, lengths.total, lengths)
        return linear_decay(highest, 0.0, self.decay.end / unit - begin, (self.decay.end - self.decay.begin) / unit)


def recorded_plan(settings: dict[str, Any], context_length: int) -> StepPlan:
    """The plan of the recorded settings of a TrainConfig, those of older programs included."""
    schedule: Schedule = from_dict(settings["schedule"], AnySchedule, "schedule")  # type: ignore[arg-type]
    phases = recorded_phases(settings)
    length = run_length(settings["max_steps"], settings.get("max_tokens"), phases)
    ramp = BatchRamp(parse_batch_size(settings["global_batch_size"]), context_length)
    return StepPlan(length, schedule, ramp, phases)
