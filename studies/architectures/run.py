"""Trains what the study of architectures needs: python -m studies.architectures.run PLAN DATA RUNS [--workers 2]

Runs that are finished, here or in the results beside PLAN, stay as they are, and others continue, so the same command
goes on after an interruption. Sizes are trained one after the other: first the runs that choose the learning rate of
each architecture, then those that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kraken_train.common.cli import FAULT_EXIT_CODE, exit_with_message, user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.common.help import make_parser
from launch.local_queue import Place, places, usable_cores, visible_gpus
from studies.architectures.plan import Plan, read_plan
from studies.results import Results
from studies.study import Run
from studies.training import train


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="what to train: studies/architectures/cpu.yaml, ...")
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="folder that data_prep.prepare has written")
    parser.add_argument("runs_dir", type=Path, metavar="RUNS", help="folder for the runs")
    parser.add_argument("--sizes", help="such as 1m,2m; default: all of the plan")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per GPU, or one")
    options = parser.parse_args(arguments)
    with user_errors(options.runs_dir):
        plan = read_plan(options.plan)
        sizes = chosen_sizes(plan, options.sizes)
        at = places(options.workers, usable_cores(), visible_gpus())
        failed = train_all(plan, sizes, options.data_dir, options.runs_dir, at)
        if failed:
            exit_with_message(f"{len(failed)} runs failed; the same command tries them again", FAULT_EXIT_CODE)
        print(f"finished; write the verdict with: python -m studies.architectures.verdict {options.plan} "
              f"{options.runs_dir}")  # fmt: skip


def chosen_sizes(plan: Plan, text: str | None) -> list[str]:
    """Raises ConfigError for a size that the plan does not have."""
    sizes = list(plan.sizes) if text is None else text.split(",")
    unknown = [size for size in sizes if size not in plan.sizes]
    if unknown:
        raise ConfigError(f"--sizes {text}: {plan.path} has no {unknown[0]}; use one of {', '.join(plan.sizes)}")
    return sizes


def train_all(plan: Plan, sizes: Sequence[str], data_dir: Path, runs_dir: Path, at: Sequence[Place]) -> set[Run]:
    """Train and record what is missing of these sizes; the runs that failed."""
    Results(plan.study, runs_dir).require_same_data(data_dir)
    failed: set[Run] = set()
    for size in sizes:
        while True:
            runs = [run for run in plan.missing([size], plan.results(runs_dir)) if run not in failed]
            if not runs:
                break
            print(f"{size}: {len(runs)} runs", flush=True)
            failed |= set(train(runs, data_dir, Results(plan.study, runs_dir), at))
    return failed


if __name__ == "__main__":
    main()
