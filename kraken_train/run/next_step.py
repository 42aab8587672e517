"""The next step for a run, in words and as a command that works with the files that exist."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from kraken_train.run.events import FAILED, FINISHED, INTERRUPTED
from kraken_train.run.layout import IDENTITY_FILE
from kraken_train.run.state import DIED, NOT_STARTED, RUNNING, WAITING, RunState


def next_step(state: RunState) -> str:
    run = shlex.quote(state.path)
    elsewhere = {
        RUNNING: f"python -m kraken_train.status {run} --log --follow",
        WAITING: f"wait; squeue --job {state.job} says for what, or {run}/submissions/*/*.out how it has ended",
        NOT_STARTED: f"start it: python -m kraken_train.train run_dir={run} ...",
    }
    if state.state in elsewhere:
        return elsewhere[state.state]
    if state.state == FINISHED and (use := use_of_result(state)) is not None:
        return use
    return "".join([*(f"first {repair}; " for repair in repairs(state)), introduction_of(state), command_of(state)])


def use_of_result(state: RunState) -> str | None:
    """The command for what training has made; None where nothing is left of that."""
    exported = [export for export in state.exports if export.is_there]
    if exported and (state.checkpoint_step is None or exported[-1].step >= state.checkpoint_step):
        folder = shlex.quote(exported[-1].path)
        if state.data_dir is None:
            return f'python -m kraken_train.generate export_dir={folder} prompt="Once upon a time"'
        return f"python -m kraken_train.evaluate export_dir={folder} data_dir={shlex.quote(state.data_dir)}"
    if state.checkpoint_step is None or state.identity_usable is False:
        return None
    export = f"python -m checkpoints.export run_dir={shlex.quote(state.path)} output_dir=EXPORT"
    if state.checkpoint_step < state.step and not state.missing_inputs:
        return f"do the steps after {state.checkpoint_step} again: {command_of(state)}; or export as it is: {export}"
    return export


def repairs(state: RunState) -> Iterator[str]:
    """What must be done before the command that started the run can continue it."""
    file = f"{shlex.quote(state.path)}/{IDENTITY_FILE}"
    if not state.identity_usable and state.checkpoint_step is None:
        yield f"restore {file} from a copy of the run"
    elif state.identity_usable is False:
        yield f"rm {file}, as the checkpoint says the same"
    if state.missing_inputs:
        yield f"bring back {' and '.join(state.missing_inputs)}"
    if state.checkpoint_step is None and state.damaged_checkpoints:
        folder, aside = (shlex.quote(f"{state.path}/{name}") for name in ("checkpoints", "checkpoints.damaged"))
        yield f"restore a checkpoint from a copy, or mv {folder} {aside} to train from the start"


def introduction_of(state: RunState) -> str:
    """The words before the command: what it does."""
    if state.state == FAILED and state.errors and not any(error.restart_helps for error in state.errors):
        return "do what the error says, then: "
    if state.checkpoint_step is None and not state.damaged_checkpoints:
        return "there is no checkpoint, so the same command trains from the start: "
    return "the same command continues: "


def command_of(state: RunState) -> str:
    if state.command is None:
        return "the command that started it"
    again = state.command if state.folder is None else f"cd {shlex.quote(state.folder)} && {state.command}"
    if state.job is not None and state.state in (FAILED, DIED, INTERRUPTED):
        return f"submit it again, as job {state.job} was, or: {again}"
    return again
