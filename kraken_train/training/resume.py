"""Resuming a run: which checkpoint it continues from, and whether today's settings can continue it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checkpoints.training.manifest import Checkpoint
from checkpoints.training.store import find_good_checkpoint, mark_newer_as_damaged, model_of
from kraken_train.common.errors import CheckpointError
from kraken_train.common.settings import to_dict
from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.parallel.ranks import Runtime
from kraken_train.recipe.batch_ramp import Position, describe_batch_size
from kraken_train.recipe.phases import describe_phases, recorded_phases
from kraken_train.run.folder import RunFolder
from kraken_train.run.recorded_settings import recorded_settings
from kraken_train.training.optim import describe_jump

LEARNING_SETTINGS = (
    "optim",
    "schedule",
    "max_steps",
    "max_tokens",
    "phases",
    "global_batch_size",
    "precision",
    "loss",
    "distill",
    "attention_within_documents",
)
FOLDERS = ("distill.teacher",)  # of these, those that may be elsewhere now: their content is known by a fingerprint
LENGTHS = ("max_steps", "max_tokens", "phases")  # of these, those that may change where no step is left to do


def find_checkpoint_to_resume(
    run: RunFolder,
    config: TrainConfig,
    model_config: ModelConfig,
    data_fingerprint: str,
    runtime: Runtime,
    print_line: Callable[[str], None],
) -> Checkpoint:
    """The newest good checkpoint of `run`; newer, damaged ones are renamed. A collective.

    `print_line` gets what deserves a line on the console: damaged checkpoints and changed settings. Raises
    CheckpointError where there is no good checkpoint, where it belongs to another run, model or data (those of the
    first phase), or where `max_steps`, `max_tokens` or `phases` leave no step to do.
    """
    checkpoint, problems = find_good_checkpoint(run.checkpoints, runtime)
    for problem in problems:
        print_line(f"passed over a damaged checkpoint: {problem}")
    for what, differs in (
        ("another model", model_of(checkpoint) != model_config),
        ("a run on other data", checkpoint.recorded("data_fingerprint") != data_fingerprint),
        ("another run", checkpoint.recorded("run_id") != run.run_id),
    ):
        if differs:
            raise CheckpointError(f"{checkpoint.path} is the checkpoint of {what}; move it out of this run's folder")
    runtime.on_first(lambda: mark_newer_as_damaged(checkpoint))
    check_settings(checkpoint, config, model_config.context_length, print_line)
    return checkpoint


def check_settings(
    checkpoint: Checkpoint, config: TrainConfig, context_length: int, print_line: Callable[[str], None]
) -> None:
    """Print which settings differ from the checkpoint's. Raises CheckpointError where no step is left to do."""
    before, now = recorded_settings(checkpoint.recorded("config")), to_dict(config)
    changes = changed_settings(before, now)
    for change in changes:
        print_line(f"changed since the checkpoint: {change}")
    others = "; ".join(change for change in changes if not change.startswith(LENGTHS))
    position, plan = position_of(checkpoint), config.step_plan(context_length)
    if plan.end(position).step > position.step:
        if (jump := describe_jump(before, now, position, context_length)) is not None:
            print_line(f"note: {jump}")
    elif others or plan.is_beyond(position):
        done = f"{position.step} steps" if config.length.tokens is None else f"{position.tokens:,} tokens"
        raise CheckpointError(
            f"run_dir={config.run_dir} holds a run that has done {done}"
            f"{f' with other settings ({others})' if others else ''}, and {config.length}; "
            f"raise {config.length.setting}, or use another run_dir"
        )


def position_of(checkpoint: Checkpoint) -> Position:
    """Older programs have not kept the tokens of the steps, only all that were consumed."""
    tokens = "trained_tokens" if "trained_tokens" in checkpoint.metadata else "tokens"
    return Position(checkpoint.step, checkpoint.recorded(tokens))


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings with influence on what is learned that differ, as "optim.lr: 0.001 -> 0.002"."""
    found = []
    for group in LEARNING_SETTINGS:
        old, new = before[group], now[group]
        if group == "global_batch_size":
            old, new = describe_batch_size(old), describe_batch_size(new)
        elif group == "phases":
            old, new = (describe_phases(recorded_phases(settings)) for settings in (before, now))
        pairs = {f"{group}.{k}": (old.get(k), new[k]) for k in new} if isinstance(new, dict) else {group: (old, new)}
        found += [
            f"{name}: {then} -> {today}"
            for name, (then, today) in pairs.items()
            if then != today and not (name in FOLDERS and then and today)
        ]
    return found
