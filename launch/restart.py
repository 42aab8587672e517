"""The checks that the batch script of a training job makes before its ranks start and after they have ended.

    python -m launch.restart before --ranks NUMBER OVERRIDES...
    python -m launch.restart after --exit-code CODE --slurm-reason REASON --max-restarts NUMBER OVERRIDES...

`before` checks settings, data and run folder on one process; exit code 2 means that the ranks cannot start. `after`
reads from the run folder how the ranks ended; its own exit code says how the job should end:

    0     the run is finished
    75    the script should requeue the job (REQUEUE_EXIT_CODE)
    2     a restart would not help; the error has been printed
    1     restarts have not helped
    143   the ranks were asked to end, but not by Slurm
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kraken_train.common.cli import user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.run.events import read_events
from kraken_train.run.layout import EVENTS_FILE
from launch.preflight import check_training, train_config
from launch.slurm.requeue import (
    REQUEUE_EXIT_CODE,
    Decision,
    decide,
    read_attempt_errors,
    record_allocation,
    record_requeue,
    split_attempt,
)

# Why Slurm ends the job, as the script names it and as people read it.
SLURM_REASONS = {"": None, "limit": "the time limit is near", "preempted": "Slurm has preempted the job"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks of a training job's batch script, before and after its ranks.")
    actions = parser.add_subparsers(dest="action", required=True)
    before = actions.add_parser("before")
    # An option, because SLURM_NTASKS is 1 here if srun has started this process, as it does with a container.
    before.add_argument("--ranks", required=True, help="number of ranks that will be started")
    after = actions.add_parser("after")
    after.add_argument("--exit-code", type=int, required=True, help="exit code of srun")
    # --told: the name in scripts of earlier versions
    after.add_argument("--slurm-reason", "--told", choices=SLURM_REASONS, required=True, help="why Slurm ends the job")
    after.add_argument("--max-restarts", type=int, required=True, help="limit of restarts without a newer checkpoint")
    for action in (before, after):
        action.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of kraken_train.train")
    arguments = parser.parse_args()
    with user_errors(Path.cwd()):
        if arguments.action == "before":
            check_before(arguments.overrides, arguments.ranks)
            return
        decision = decide_after(
            Path(train_config(arguments.overrides).run_dir),
            arguments.exit_code,
            SLURM_REASONS[arguments.slurm_reason],
            arguments.max_restarts,
        )
    sys.exit(decision.exit_code)


def check_before(overrides: Sequence[str], ranks: str) -> None:
    """Check that the ranks can start, and record the attempt. Raises KrakenError, with nothing changed."""
    if not ranks.isdigit():
        raise ConfigError(
            f"SLURM_NTASKS={ranks} is not the number of ranks; run this in a job with #SBATCH --ntasks-per-node=RANKS"
        )
    config = train_config(overrides)
    check_training(config, int(ranks))
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    record_allocation(run_dir, run_dir / EVENTS_FILE)


def decide_after(run_dir: Path, exit_code: int, slurm_reason: str | None, max_restarts: int) -> Decision:
    """Decide how the job ends, print it, and record a requeue. Raises KrakenError."""
    earlier, attempt = split_attempt(read_events(run_dir / EVENTS_FILE))
    errors = read_attempt_errors(run_dir, attempt)
    decision = decide(earlier, attempt, errors, exit_code, slurm_reason, max_restarts)
    if decision.exit_code == REQUEUE_EXIT_CODE:
        record_requeue(run_dir / EVENTS_FILE, decision.message)
        print(f"requeued: {decision.message}", flush=True)
    elif decision.exit_code:
        print(f"error: {decision.message}", file=sys.stderr, flush=True)
    else:
        print(decision.message, flush=True)
    return decision


if __name__ == "__main__":
    main()
