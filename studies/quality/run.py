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
from kraken_train.run.exports import is_export
from launch.local_queue import Job, interrupt_on_sigterm, places, python, run_jobs, usable_cores, visible_gpus
from studies.quality.arms import TEACHER, Run, read_questions
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
        runs = missing(options.questions, results)
        interrupt_on_sigterm()
        try:
            for jobs in stages(runs, options.data_dir, results):
                failed = run_jobs(jobs, at, lambda line: print(line, flush=True))
                if failed:
                    exit_with_message(f"{len(failed)} of {len(jobs)} runs failed", FAULT_EXIT_CODE)
        except KeyboardInterrupt:
            sys.exit(130)


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


def stages(runs: Sequence[Run], data_dir: Path, results: Results) -> list[list[Job]]:
    """The jobs in stages, each after the end of the one before: runs without a teacher, exports, runs with a teacher.

    A teacher whose weights are not here is trained anew, also if its result is recorded.
    """
    plain, taught = ([run for run in runs if (run.teacher is not None) == has] for has in (False, True))
    teachers = sorted({run.teacher for run in taught if run.teacher is not None}, key=lambda run: (run.seed, run.arm))
    teachers = [run for run in teachers if not is_export(results.export_of(run))]
    plain += [run for run in teachers if run not in plain and not results.is_finished(run)]
    return [
        [job_of(run, data_dir, results) for run in plain],
        [export_job(run, results) for run in teachers],
        [job_of(run, data_dir, results) for run in taught],
    ]


def job_of(run: Run, data_dir: Path, results: Results) -> Job:
    folder, settings = results.runs_dir / run.name, list(run.overrides)
    results.runs_dir.mkdir(parents=True, exist_ok=True)
    results.settings_file(run).write_text("".join(f"{line}\n" for line in settings), encoding="utf-8")
    if run.teacher is not None:
        export = results.export_of(run.teacher)
        settings = [f"{TEACHER}{export}" if line.startswith(TEACHER) else line for line in settings]
    command = python("studies.quality.train", [*settings, f"data_dir={data_dir}", f"run_dir={folder}"])
    return Job(run.name, (command,), log_of(folder))


def export_job(run: Run, results: Results) -> Job:
    folder = results.runs_dir / run.name
    command = python("checkpoints.export", [f"run_dir={folder}", f"output_dir={results.export_of(run)}"])
    return Job(f"export of {run.name}", (command,), log_of(folder))


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


if __name__ == "__main__":
    main()
