"""Trains what the questions of the study need: python -m studies.quality.run DATA RUNS [QUESTION...] [--workers 2]

Runs that are finished, here or in `results.jsonl`, stay as they are, and others continue, so the same command goes on
after an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kraken_train.common.cli import FAULT_EXIT_CODE, exit_with_message, user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.common.help import make_parser
from kraken_train.run.exports import is_export
from launch.local_queue import Job, places, python, usable_cores, visible_gpus
from studies.quality.arms import STUDY, TEACHER, read_questions, teacher_of
from studies.results import Results
from studies.study import Run
from studies.training import job_of, log_of, start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="folder that data_prep.prepare has written")
    parser.add_argument("runs_dir", type=Path, metavar="RUNS", help="folder for the runs")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="names of questions; default: all")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per GPU, or one")
    options = parser.parse_intermixed_args(arguments)
    with user_errors(options.runs_dir):
        at = places(options.workers, usable_cores(), visible_gpus())
        results = Results(STUDY, options.runs_dir)
        results.require_same_data(options.data_dir)
        for jobs in stages(missing(options.questions, results), options.data_dir, results):
            if failed := start(jobs, at):
                exit_with_message(f"{len(failed)} of {len(jobs)} runs failed", FAULT_EXIT_CODE)


def missing(names: Sequence[str], results: Results) -> list[Run]:
    """The runs of these questions that are not finished: the first seed of all arms, then the second.

    Within a seed they follow `names`, or the order of the questions where that is empty.

    Raises ConfigError for an unknown question, and for a run that was started with other settings.
    """
    by_name = {question.name: question for question in read_questions()}
    if unknown := set(names) - set(by_name):
        raise ConfigError(f"there is no question {', '.join(sorted(unknown))}")
    unique = dict.fromkeys(run for name in names or by_name for run in by_name[name].runs)
    runs = sorted(unique, key=lambda run: run.seed)  # a stable sort: it keeps the order of the questions
    return [run for run in runs if not results.is_known(run)]


def stages(runs: Sequence[Run], data_dir: Path, results: Results) -> list[list[Job]]:
    """The jobs in stages, each after the end of the one before: runs without a teacher, exports, runs with a teacher.

    A teacher whose weights are not here is trained anew, also if its result is recorded.
    """
    teachers = {run: teacher for run in runs if (teacher := teacher_of(run)) is not None}
    plain = [run for run in runs if run not in teachers]
    needed = sorted(set(teachers.values()), key=lambda run: (run.seed, run.arm))
    exported = [run for run in needed if not is_export(results.export_of(run))]
    plain += [run for run in exported if run not in plain and not results.is_finished(run)]
    return [
        [job_of(run, data_dir, results) for run in plain],
        [export_job(run, results) for run in exported],
        [taught_job(run, teacher, data_dir, results) for run, teacher in teachers.items()],
    ]


def taught_job(run: Run, teacher: Run, data_dir: Path, results: Results) -> Job:
    """The settings that are recorded name the arm of the teacher, those of the program its export."""
    export = results.export_of(teacher)
    return job_of(
        run,
        data_dir,
        results,
        [f"{TEACHER}{export}" if line.startswith(TEACHER) else line for line in results.study.overrides(run)],
    )


def export_job(run: Run, results: Results) -> Job:
    folder = results.runs_dir / run.name
    command = python("checkpoints.export", [f"run_dir={folder}", f"output_dir={results.export_of(run)}"])
    return Job(f"export of {run.name}", (command,), log_of(folder))


if __name__ == "__main__":
    main()
