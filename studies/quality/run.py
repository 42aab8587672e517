"""Trains what the questions of the study need: python -m studies.quality.run DATA RUNS [QUESTION...] [--workers 2]

Runs that are finished stay as they are, and others continue, so the same command goes on after an interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kraken_train.common.cli import FAULT_EXIT_CODE, exit_with_message, user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.common.help import make_parser
from kraken_train.run.events import FINISHED
from kraken_train.run.state import read_state
from launch.local_queue import Job, interrupt_on_sigterm, places, python, run_jobs, usable_cores, visible_gpus
from studies.quality.arms import Question, Run, read_questions


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="folder that data_prep.prepare has written")
    parser.add_argument("runs_dir", type=Path, metavar="RUNS", help="folder for the runs")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="names of questions; default: all")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per GPU, or one")
    options = parser.parse_args(arguments)
    with user_errors(options.runs_dir):
        at = places(options.workers, usable_cores(), visible_gpus())
        jobs = [job_of(run, options.data_dir, options.runs_dir) for run in missing(options.questions, options.runs_dir)]
        interrupt_on_sigterm()
        try:
            failed = run_jobs(jobs, at, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            sys.exit(130)
        if failed:
            exit_with_message(f"{len(failed)} of {len(jobs)} runs failed", FAULT_EXIT_CODE)


def missing(names: Sequence[str], runs_dir: Path) -> list[Run]:
    """The runs of these questions that are not finished: the first seed of all arms, then the second."""
    questions = read_questions()
    unknown = set(names) - {question.name for question in questions}
    if unknown:
        raise ConfigError(f"there is no question {', '.join(sorted(unknown))}")
    chosen = [question for question in questions if not names or question.name in names]
    runs = sorted({run for question in chosen for run in runs_of(question)}, key=lambda run: (run.seed, run.arm))
    return [run for run in runs if not is_finished(runs_dir / run.name)]


def runs_of(question: Question) -> list[Run]:
    return [Run(arm, seed) for arm in question.arms for seed in question.seeds]


def is_finished(folder: Path) -> bool:
    return folder.is_dir() and read_state(folder).state == FINISHED


def job_of(run: Run, data_dir: Path, runs_dir: Path) -> Job:
    folder = runs_dir / run.name
    command = python("studies.quality.train", [*run.overrides, f"data_dir={data_dir}", f"run_dir={folder}"])
    return Job(run.name, (command,), folder.with_name(f"{folder.name}.log"))


if __name__ == "__main__":
    main()
