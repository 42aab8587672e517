"""The phases that a run has begun, as its checkpoints record them: these cannot change, while later ones can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from checkpoints.training.manifest import Checkpoint
from kraken_train.common.errors import CheckpointError
from kraken_train.common.token_counts import format_tokens
from kraken_train.config import TrainConfig
from kraken_train.recipe.phases import CONTINUE
from kraken_train.training.resume import position_of

Record = dict[str, Any]  # until (None: by max_steps), schedule and data_fingerprint


def phase_records(config: TrainConfig, fingerprints: Sequence[str]) -> list[Record]:
    """Of all phases; a run without phases has one, which ends with it. `fingerprints` are those of the data of each."""
    if not config.phases:
        return [record(config.max_tokens, CONTINUE, fingerprints[0])]
    return [
        record(phase.until, phase.schedule, fingerprint)
        for phase, fingerprint in zip(config.phases, fingerprints, strict=True)
    ]


def record(until: int | None, schedule: str, fingerprint: str) -> Record:
    return {"until": until, "schedule": schedule, "data_fingerprint": fingerprint}


def started_phases(metadata: dict[str, Any]) -> list[Record]:
    """Those of which a step was done, from the metadata of a checkpoint; older programs had no phases."""
    only = record(metadata["config"].get("max_tokens"), CONTINUE, metadata["data_fingerprint"])
    found: list[Record] = metadata.get("phases", [only])
    return found


def require_same_phases(config: TrainConfig, fingerprints: Sequence[str], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the phases that the run has begun are those of now.

    A phase that has begun keeps its data, its schedule and, once it is over, its end.
    """
    started, now = started_phases(checkpoint.metadata), phase_records(config, fingerprints)
    done, last = position_of(checkpoint).tokens, len(started) - 1
    problems = [
        difference(f"phases[{number}]", before, now[number] if number < len(now) else None, is_over=number < last)
        for number, before in enumerate(started)
    ]
    if config.phases and last < len(now):
        then, today = started[last]["until"], now[last]["until"]
        if today != then and today < done:
            problems.append(f"phases[{last}].until={format_tokens(today)} is less than that now")
    for problem in filter(None, problems):
        raise CheckpointError(
            f"run_dir={config.run_dir} holds a run that has done {done:,} tokens and has begun phases[{last}], but "
            f"{problem}; change only what comes later, or use another run_dir"
        )


def difference(name: str, before: Record, now: Record | None, is_over: bool) -> str | None:
    """How a phase that has begun differs now from what it was `before`; None: it does not."""
    if now is None:
        return f"there is no {name} now"
    if before["data_fingerprint"] != now["data_fingerprint"]:
        return (
            f"the data of {name} or their weights are others now (fingerprint {before['data_fingerprint']} before, "
            f"{now['data_fingerprint']} now)"
        )
    if before["schedule"] != now["schedule"]:
        return f"{name}.schedule was {before['schedule']} and is {now['schedule']} now"
    if is_over and before["until"] != now["until"]:
        return f"{name}.until was {format_tokens(before['until'])} and is {describe_end(now['until'])} now"
    return None


def describe_end(until: int | None) -> str:
    return "the end of the run" if until is None else format_tokens(until)
