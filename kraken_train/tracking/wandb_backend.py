"""A run's copy in Weights & Biases: one run there whose id is the run folder's, however often training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import wandb

from kraken_train.common.errors import CheckpointError
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.tracking.backend import event_line, numbers, only_writer
from kraken_train.tracking.run_info import DescribedRun
from kraken_train.tracking.wandb_files import end_at_last_record, last_step, wandb_files

LOSSES = ("loss", "validation_loss")


class WandbCopy:
    """Goes on behind the last step that Weights & Biases has; what it has is never logged again.

    A step that training does again, after a crash or a rollback, is therefore shown as it went the first time.
    Where the service cannot be reached, the run is recorded in the run folder instead, and `note` is told.
    """

    def __init__(self, described: DescribedRun, mode: str, note: Callable[[str], None]) -> None:
        with suppress(Exception):
            wandb.teardown()  # of an earlier copy of this process that has failed
        mend_files(described, mode)
        # Before this start has a file of its own.
        recorded = last_step(wandb_files(described.path, described.run_id))
        self.run, online = start(described, mode, note)
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

    def tell(self, event: dict[str, Any], news: bool) -> None:
        self.events.add(event)
        if news:
            print(event_line(event), flush=True)  # which W&B shows as the run's output

    def begin_again(self) -> None:
        pass  # what is logged cannot be taken back

    def close(self, exit_code: int) -> None:
        self.run.summary.update(self.events.take())
        if exit_code == INTERRUPTED_EXIT_CODE:
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)


def mend_files(described: DescribedRun, mode: str) -> None:
    """So that what earlier starts have recorded can be uploaded, however they have ended.

    The caller keeps others from writing in this mode; where somebody writes in the other one, nothing is changed.
    """
    other = "offline" if mode == "online" else "online"
    with suppress(CheckpointError), only_writer(described.path, other, wait=False):
        for file in wandb_files(described.path, described.run_id):
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


def start(described: DescribedRun, mode: str, note: Callable[[str], None]) -> tuple[Any, bool]:
    """The run in W&B, new or continued, and whether the service takes part in it."""
    if mode == "online":
        try:
            return init(described, mode), True
        except wandb.errors.Error as error:
            wandb.teardown()  # with what is still trying
            reason = str(error).strip().splitlines()[0]
            note(
                f"Weights & Biases cannot be reached ({reason}): this start is recorded in {described.path / 'wandb'}; "
                f"upload it with `wandb sync {described.path / 'wandb' / 'offline-run-*'}`"
            )
    return init(described, "offline"), False


def init(described: DescribedRun, mode: str) -> Any:
    tracking = described.tracking
    return wandb.init(
        id=described.run_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        project=tracking.project,
        entity=tracking.entity,
        name=described.name,
        group=tracking.group,
        tags=list(tracking.tags),
        notes=tracking.notes,
        dir=str(described.path),
        config={**described.settings, **described.facts},
        allow_val_change=True,  # such as the hosts
        settings=wandb.Settings(console="wrap"),
    )
