"""Trains runs of a study on this machine, several at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.local_queue import Job, Place, interrupt_on_sigterm, python, run_jobs
from studies.results import Results
from studies.study import Run


def train(runs: Sequence[Run], data_dir: Path, results: Results, at: Sequence[Place]) -> list[Run]:
    """Start or continue these runs; those that failed. An interruption ends the program."""
    jobs = {run: job_of(run, data_dir, results) for run in runs}
    failed = start(list(jobs.values()), at)
    return [run for run, job in jobs.items() if job in failed]


def start(jobs: Sequence[Job], at: Sequence[Place]) -> list[Job]:
    """Those that failed. An interruption ends the program."""
    interrupt_on_sigterm()
    try:
        return run_jobs(jobs, at, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)


def job_of(run: Run, data_dir: Path, results: Results, arguments: Sequence[str] | None = None) -> Job:
    """`arguments` of the program, without its folders; None: the settings of the run, which are recorded."""
    folder, overrides = results.runs_dir / run.name, results.study.overrides(run)
    results.runs_dir.mkdir(parents=True, exist_ok=True)
    results.settings_file(run).write_text("".join(f"{line}\n" for line in overrides), encoding="utf-8")
    command = python(results.study.program, [*(arguments or overrides), f"data_dir={data_dir}", f"run_dir={folder}"])
    return Job(run.name, (command,), log_of(folder))


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
