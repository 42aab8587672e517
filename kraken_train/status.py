"""Where training runs are, and what to do next: python -m kraken_train.status RUN [RUN...]

One run is described, several are listed. --log prints what the ranks have printed, in the order of time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from kraken_train.common.cli import user_errors
from kraken_train.common.durations import duration
from kraken_train.common.errors import CheckpointError
from kraken_train.common.help import make_parser
from kraken_train.run.logs import follow, logs_of, merged
from kraken_train.run.next_step import next_step
from kraken_train.run.state import RUNNING, UNKNOWN, RunState, Start, read_state

LABEL_WIDTH = 12
STARTS_SHOWN = 5
LOG_LINES = 100
TABLE_WIDTH = 250  # at most; a narrow terminal breaks lines better than columns would fold


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the run_dir of a training run")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="everything, as a list with an object per run")
    shown.add_argument("--log", nargs="?", type=int, const=LOG_LINES, metavar="LINES", help="the last lines that the "
                       f"ranks have printed ({LOG_LINES}; 0: all)")  # fmt: skip
    parser.add_argument("--start", type=int, metavar="K", help="the log of this start, in place of the newest")
    parser.add_argument("--follow", action="store_true", help="with --log, print new lines while the run is running")
    parser.add_argument("--verify", action="store_true", help="read every byte of the newest checkpoint")
    options = parser.parse_args()
    with user_errors(options.runs[0]):
        try:
            if options.log is not None or options.start is not None or options.follow:
                for run in options.runs:
                    print_log(run, LOG_LINES if options.log is None else options.log, options.start, options.follow)
            else:
                print_states([read_state(run) for run in options.runs], options.json, options.verify)
        except KeyboardInterrupt:
            pass


def print_log(run: Path, lines: int, start: int | None, following: bool) -> None:
    folder = logs_of(run, start)
    if following:
        output: Iterable[str] = follow(folder, lines, lambda: read_state(run).state == RUNNING)
    else:
        output = merged(folder, lines or None)
    for line in output:
        print(line, flush=following)


def print_states(states: list[RunState], as_json: bool, verify: bool) -> None:
    if as_json:
        print(json.dumps([state.to_json() | ({"verified": verified(state)} if verify else {}) for state in states]))
    elif len(states) > 1:
        print_table(states)
    else:
        for label, text in describe(states[0]):
            print(f"{label:{LABEL_WIDTH}}{text}")
    if verify and not as_json:
        for state in states:
            print(f"{'verified':{LABEL_WIDTH}}{verified(state)}")


def verified(state: RunState) -> str:
    """Which checkpoint is whole, by its checksums, and what is wrong with newer ones."""
    from checkpoints.training.store import find_good_checkpoint  # noqa: PLC0415 (imports torch, which takes seconds)

    try:
        checkpoint, problems = find_good_checkpoint(Path(state.path) / "checkpoints")
    except CheckpointError as error:
        return str(error)
    return "; ".join([f"step {checkpoint.step}, all {len(checkpoint.files)} files", *problems])


def describe(state: RunState) -> list[tuple[str, str]]:
    """Labels and lines."""
    lines = [("run", state.path), ("state", state.state)]
    if state.reason and not state.errors:
        lines[-1] = ("state", f"{state.state}: {state.reason}")
    if state.job is not None:
        lines.append(("job", state.job))
    if state.max_steps:
        lines.append(("step", f"{state.step} of {state.max_steps} ({state.step / state.max_steps:.1%})"))
    if state.phase is not None and state.phase < len(state.phases):
        lines.append(("phase", f"{state.phase + 1} of {len(state.phases)}: {state.phases[state.phase]}"))
    if state.precision is not None:
        lines.append(("precision", state.precision))
    if state.loss is not None:
        validation = "" if state.validation_loss is None else f", validation {state.validation_loss:.4f}"
        lines.append(("loss", f"{state.loss:.4f}{validation}"))
    if state.tokens_per_second is not None:
        trend = "" if state.trend is None else f" ({state.trend:+.0%} against the steps before)"
        left = "" if state.seconds_left is None else f", {duration(state.seconds_left)} left"
        lines.append(("speed", f"{state.tokens_per_second:,.0f} tokens/s{trend}{left}"))
    lines.append(("checkpoint", describe_checkpoint(state)))
    lines += [
        ("export", f"step {export.step} in {export.path}{'' if export.is_there else ', which is gone'}")
        for export in state.exports
    ]
    lines += [("problem", problem) for problem in state.problems]
    lines += [("missing", missing) for missing in state.missing_inputs]
    for what, number in (("skipped", state.skipped_steps), ("rolled back", state.rollbacks)):
        if number:
            lines.append((what, f"{number} {'steps' if what == 'skipped' else 'times'}"))
    requeues = f", {state.requeues} of them requeued" if state.requeues else ""
    if state.starts:
        lines.append(("starts", f"{len(state.starts)}{requeues}"))
        lines += [("", describe_start(start)) for start in state.starts[-STARTS_SHOWN:]]
    if state.tracking is not None:
        lines.append(("tracking", state.tracking))
    lines += [("error", f"{error}: {error.message}") for error in state.errors]
    return [*lines, ("next", next_step(state))]


def describe_checkpoint(state: RunState) -> str:
    if state.checkpoint_step is not None:
        text = (
            f"step {state.checkpoint_step}, {duration(state.checkpoint_age or 0)} old, its {state.checkpoint_files} "
            "files have their listed sizes"
        )
    elif state.damaged_checkpoints:
        text = "none is whole"
    else:
        text = "none yet" if state.saved_step is None else f"none is left; step {state.saved_step} was saved"
    return "; damaged: ".join([text, *state.damaged_checkpoints])


def describe_start(start: Start) -> str:
    if start.outcome == UNKNOWN:
        return f"{start.number}: there are no events of it"
    steps = "before its first step" if start.from_step is None else f"from step {start.from_step}"
    if start.from_step is not None and start.to_step is not None:
        steps += f" to {start.to_step}"
    when = "" if start.time is None else f", {duration(age_of(start.time))} ago"
    where = f", on {', '.join(start.hosts)}" if start.hosts else ""
    return f"{start.number}: {steps}{when}{where}: {start.outcome}{f' ({start.reason})' if start.reason else ''}"


def age_of(time_stamp: str) -> float:
    """Seconds since an event's time."""
    return (datetime.now(timezone.utc) - datetime.fromisoformat(time_stamp)).total_seconds()


def print_table(states: list[RunState]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "loss", "validation", "tokens/s", "left", "checkpoint", "starts"):
        justify: Literal["left", "right"] = "left" if column in ("run", "state") else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "run")
    for state in states:
        table.add_row(
            state.path,
            state.state,
            f"{state.step}/{state.max_steps or '?'}",
            "" if state.loss is None else f"{state.loss:.4f}",
            "" if state.validation_loss is None else f"{state.validation_loss:.4f}",
            "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
            "" if state.seconds_left is None else duration(state.seconds_left),
            "" if state.checkpoint_step is None else f"{state.checkpoint_step}",
            str(len(state.starts)),
        )
    Console(highlight=False, width=TABLE_WIDTH).print(table)


if __name__ == "__main__":
    main()
