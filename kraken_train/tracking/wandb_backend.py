"""The backend for Weights & Biases: one W&B run with the id of the run folder, over all starts of the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import wandb

from kraken_train.common.errors import CheckpointError
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.tracking.backend import event_line, numbers, only_writer
from kraken_train.tracking.run_info import RunInfo
from kraken_train.tracking.wandb_files import end_at_last_record, last_step, wandb_files

LOSSES = ("loss", "validation_loss", "validation_loss/*")


class WandbBackend:
    """Continues after the last step that Weights & Biases has, since no step can be logged twice there.

    Of a step that training repeats after a crash or a rollback, the first results are shown. If the service cannot be
    reached, the run is recorded in the run folder, and `note` gets a message.
    """

    def __init__(self, run_info: RunInfo, mode: str, note: Callable[[str], None]) -> None:
        with suppress(Exception):
            wandb.teardown()  # of an earlier attempt of this process that has failed
        mend_files(run_info, mode)
        # Before this start has a file of its own.
        recorded = last_step(wandb_files(run_info.path, run_info.run_id))
        self.run, online = start(run_info, mode, note)
        self.logged = max(self.run.starting_step - 1, 0) if online else recorded
        self.events = EventCounts()
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for loss in LOSSES:
            self.run.define_metric(loss, step_metric="step", summary="min,last")

    def log(self, record: dict[str, Any]) -> None:
        step = int(record["step"])
        if step <= self.logged:
            return
        self.run.log({"step": step, **numbers(record), **self.events.take()}, step=step)
        self.logged = step

    def log_event(self, event: dict[str, Any], news: bool) -> None:
        self.events.add(event)
        if news:
            print(event_line(event), flush=True)  # which W&B shows as the run's output

    def restart(self) -> None:
        pass  # what is logged cannot be taken back

    def close(self, exit_code: int) -> None:
        self.run.summary.update(self.events.take())
        if exit_code == INTERRUPTED_EXIT_CODE:
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)


def mend_files(run_info: RunInfo, mode: str) -> None:
    """So that what earlier starts have recorded can be uploaded, however they have ended.

    The caller excludes other writers in this mode; if a process writes in the other mode, nothing is changed.
    """
    other = "offline" if mode == "online" else "online"
    with suppress(CheckpointError), only_writer(run_info.path, other, wait=False):
        for file in wandb_files(run_info.path, run_info.run_id):
            end_at_last_record(file)


class EventCounts:
    """Events as curves: how often each kind has happened so far, shown with the next record."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.changed: set[str] = set()

    def add(self, event: dict[str, Any]) -> None:
        name = f"events/{event.get('event')}"
        self.counts[name] += 1
        self.changed.add(name)

    def take(self) -> dict[str, int]:
        """Those that have changed since the last time."""
        taken = {name: self.counts[name] for name in sorted(self.changed)}
        self.changed.clear()
        return taken


def start(run_info: RunInfo, mode: str, note: Callable[[str], None]) -> tuple[Any, bool]:
    """The run in W&B, new or continued, and whether the service takes part in it."""
    if mode == "online":
        try:
            return init(run_info, mode), True
        except wandb.errors.Error as error:
            wandb.teardown()  # with what is still trying
            reason = str(error).strip().splitlines()[0]
            note(
                f"Weights & Biases cannot be reached ({reason}): this start is recorded in {run_info.path / 'wandb'}; "
                f"upload it with `wandb sync {run_info.path / 'wandb' / 'offline-run-*'}`"
            )
    return init(run_info, "offline"), False


def init(run_info: RunInfo, mode: str) -> Any:
    tracking = run_info.tracking
    return wandb.init(
        id=run_info.run_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        project=tracking.project,
        entity=tracking.entity,
        name=run_info.name,
        group=tracking.group,
        tags=list(tracking.tags),
        notes=tracking.notes,
        dir=str(run_info.path),
        config={**run_info.settings, **run_info.facts},
        allow_val_change=True,  # such as the hosts
        settings=wandb.Settings(console="wrap"),
    )
