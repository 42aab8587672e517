"""Phases of a run, by tokens: the data and the schedule may change from one to the next, as for annealing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath
from kraken_train.common.settings import from_list
from kraken_train.common.token_counts import Tokens, format_tokens
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.recipe.lengths import Length

CONTINUE, DECAY = "continue", "decay"
AS_IN = "'phases=[{until: 8B}, {until: 10B, data_dir: {data/web: 0.3, data/books: 0.7}, schedule: decay}]'"


@dataclass(frozen=True)
class Phase:
    """It begins with the first step of the run, or with the step after the one that reaches the `until` before it."""

    until: Tokens  # tokens of the run, from its start on; those of the last phase are its length
    data_dir: FilePath | dict[str, Any] | None = None  # as the run's; null: that of the phase before
    # continue: the run's schedule goes on | decay: linear to 0 at the end of the run, from where that schedule has come
    schedule: str = CONTINUE


@dataclass(frozen=True)
class Decay:
    """The linear decay to 0 of the last phases, in tokens of the run."""

    begin: int
    end: int


def validate_phases(phases: Sequence[Phase]) -> None:
    """Raises ConfigError."""
    if not phases:
        raise ConfigError(f"phases=[] has no phase; give some, as in {AS_IN}, or null")
    for number, phase in enumerate(phases):
        require_positive(f"phases[{number}].until", phase.until)
        require_choice(f"phases[{number}].schedule", phase.schedule, (CONTINUE, DECAY))
        if phase.data_dir is not None and not phase.data_dir:
            raise ConfigError(f"phases[{number}].data_dir is empty; leave it out for the data of the phase before")
    for number, (before, after) in enumerate(pairwise(phases), 1):
        if before.until >= after.until:
            raise ConfigError(
                f"phases[{number}].until={format_tokens(after.until)} must be more than the "
                f"{format_tokens(before.until)} of the phase before; until counts from the start of the run"
            )
        if before.schedule == DECAY and after.schedule != DECAY:
            raise ConfigError(
                f"phases[{number}].schedule={after.schedule} follows a phase that decays to the end of the run; use "
                "decay for it too"
            )
    if phases[0].schedule == DECAY:
        raise ConfigError(
            "phases[0].schedule=decay has nothing to decay from; use continue, or schedule=wsd for the run"
        )


def decay_of(phases: Sequence[Phase]) -> Decay | None:
    """The decay of valid phases; None: the schedule of the run goes on to the end."""
    for before, phase in pairwise(phases):
        if phase.schedule == DECAY:
            return Decay(before.until, phases[-1].until)
    return None


def run_length(max_steps: int, max_tokens: int | None, phases: Sequence[Phase]) -> Length:
    """Of a run with these settings: that of its phases, if it has some."""
    if phases:
        return Length("max_steps", max_steps, f"phases[{len(phases) - 1}].until", phases[-1].until)
    return Length("max_steps", max_steps, "max_tokens", max_tokens)


def recorded_phases(settings: Mapping[str, Any]) -> tuple[Phase, ...]:
    """Of the recorded settings of a TrainConfig; older programs have recorded none. Raises ConfigError for others."""
    return tuple(from_list(settings.get("phases") or [], Phase, "phases"))


def describe_phases(phases: Sequence[Phase]) -> str:
    """As a user types them: `[{until: 8B}, {until: 10B, data_dir: data/books, schedule: decay}]`; none: `null`."""
    return f"[{', '.join(map(describe_phase, phases))}]" if phases else "null"


def describe_phase(phase: Phase) -> str:
    parts = [f"until: {format_tokens(phase.until)}"]
    if isinstance(phase.data_dir, dict):
        parts.append(f"data_dir: {{{', '.join(f'{folder}: {weight}' for folder, weight in phase.data_dir.items())}}}")
    elif phase.data_dir is not None:
        parts.append(f"data_dir: {phase.data_dir}")
    if phase.schedule != CONTINUE:
        parts.append(f"schedule: {phase.schedule}")
    return f"{{{', '.join(parts)}}}"
