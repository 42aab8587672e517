"""Trains what the questions of the study need: python -m studies.quality.run DATA RUNS [QUESTION...] [--workers 2]

Runs that are finished, here or in `results.jsonl`, stay as they are, and others continue, so the same command goes on
after an interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kraken_train.common.cli import FAULT_EXIT_CODE, exit_with_message, user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.common.help import make_parser
from launch.local_queue import Job, interrupt_on_sigterm, places, python, run_jobs, usable_cores, visible_gpus
from studies.quality.arms import Run, read_questions
from studies.quality.results import Results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="folder that data_prep.prepare has written")
    parser.add_argument("runs_dir", type=Path, metavar="RUNS", help="folder for the runs")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="names of questions; default: all")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per GPU, or one")
    options = parser.parse_args(arguments)
    with user_errors(options.runs_dir):
        at = places(options.workers, usable_cores(), visible_gpus())
        results = Results(options.runs_dir)
        jobs = [job_of(run, options.data_dir, results) for run in missing(options.questions, results)]
        interrupt_on_sigterm()
        try:
            failed = run_jobs(jobs, at, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            sys.exit(130)
        if failed:
            exit_with_message(f"{len(failed)} of {len(jobs)} runs failed", FAULT_EXIT_CODE)


def missing(names: Sequence[str], results: Results) -> list[Run]:
    """The runs of these questions that are not finished: the first seed of all arms, then the second.

    Raises ConfigError for an unknown question, and for a run that was started with other settings.
    """
    questions = read_questions()
    unknown = set(names) - {question.name for question in questions}
    if unknown:
        raise ConfigError(f"there is no question {', '.join(sorted(unknown))}")
    chosen = [question for question in questions if not names or question.name in names]
    runs = sorted({run for question in chosen for run in question.runs}, key=lambda run: (run.seed, run.arm))
    return [run for run in runs if not results.is_known(run)]


def job_of(run: Run, data_dir: Path, results: Results) -> Job:
    folder = results.runs_dir / run.name
    results.runs_dir.mkdir(parents=True, exist_ok=True)
    results.settings_file(run).write_text("".join(f"{line}\n" for line in run.overrides), encoding="utf-8")
    command = python("studies.quality.train", [*run.overrides, f"data_dir={data_dir}", f"run_dir={folder}"])
    return Job(run.name, (command,), folder.with_name(f"{folder.name}.log"))


if __name__ == "__main__":
    main()
