"""What the batch script of a training job asks before its ranks start and after they have ended.

    python -m launch.restart before --ranks NUMBER OVERRIDES...
    python -m launch.restart after --exit-code CODE --told REASON --max-restarts NUMBER OVERRIDES...

`before` checks settings, data and run folder on one process; exit code 2 means that starting is of no use. `after`
reads from the run folder how the ranks have ended and says with its own exit code how the job should:

    0     the run is finished
    75    the job should be requeued, which the script does (RESTART_EXIT_CODE)
    2     no restart would help: the error that says so has been printed
    1     restarts have not helped
    143   somebody has asked the ranks to end, and it was not Slurm

The exit code of srun is the highest of its tasks', so that of a killed rank may hide the one that tells: 143 of a
bystander is more than 2. So 2 can be believed, but what is not 2 says little, and the run folder is asked first.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.cli import FAULT_EXIT_CODE, USER_ERROR_EXIT_CODE, user_errors
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.parallel.ranks import slurm_job
from kraken_train.run.events import FINISHED, INTERRUPTED, Event, EventLog, read_events
from kraken_train.run.layout import EVENTS_FILE, start_folders
from kraken_train.run.rank_errors import RankError, read_errors, root_causes
from launch.preflight import check_training, train_config

RESTART_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
# What Slurm may have told the script, or the ranks, and why that is a reason to requeue.
TOLD = {"": None, "limit": "the time limit is near", "preempted": "Slurm has preempted the job"}


@dataclass(frozen=True)
class Decision:
    """How the job goes on."""

    exit_code: int
    message: str


def main() -> None:
    parser = argparse.ArgumentParser(description="What a batch script of training asks before and after its ranks.")
    actions = parser.add_subparsers(dest="action", required=True)
    before = actions.add_parser("before")
    # SLURM_NTASKS is that of the step where srun has started this process, as it does with a container.
    before.add_argument("--ranks", required=True, help="that will be started")
    after = actions.add_parser("after")
    after.add_argument("--exit-code", type=int, required=True, help="of srun")
    after.add_argument("--told", choices=TOLD, required=True, help="what Slurm has told the job")
    after.add_argument("--max-restarts", type=int, required=True, help="in a row without a newer checkpoint")
    for action in (before, after):
        action.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of kraken_train.train")
    arguments = parser.parse_args()
    with user_errors(Path.cwd()):
        if arguments.action == "before":
            prepare_start(arguments.overrides, arguments.ranks)
            return
        run_dir = Path(train_config(arguments.overrides).run_dir)
        earlier, attempt = split_attempt(read_events(run_dir / EVENTS_FILE))
        errors = errors_of_attempt(run_dir, attempt)
        told = TOLD[arguments.told]
        decision = decide(earlier, attempt, errors, arguments.exit_code, told, arguments.max_restarts)
        if decision.exit_code == RESTART_EXIT_CODE:
            record_restart(run_dir / EVENTS_FILE, decision.message)
            print(f"requeued: {decision.message}", flush=True)
        elif decision.exit_code:
            print(f"error: {decision.message}", file=sys.stderr, flush=True)
        else:
            print(decision.message, flush=True)
    sys.exit(decision.exit_code)


def prepare_start(overrides: Sequence[str], ranks: str) -> None:
    """Check that ranks can start, and note that they will. Raises KrakenError, with nothing changed."""
    if not ranks.isdigit():
        raise ConfigError(
            f"SLURM_NTASKS={ranks} is not the number of ranks; run this in a job with #SBATCH --ntasks-per-node=RANKS"
        )
    config = train_config(overrides)
    check_training(config, int(ranks))
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    starts = len(start_folders(run_dir))
    details = {"requeues": 0, **slurm_job(), "job": job_id(), "nodes": nodes(), "earlier_starts": starts}
    EventLog(run_dir / EVENTS_FILE).write("allocated", **details)


def job_id() -> str:
    """The job as users name it, within an array with its number there."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def nodes() -> list[str]:
    try:
        result = subprocess.run(
            ["scontrol", "show", "hostnames"], capture_output=True, encoding="utf-8", errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):  # in a container there may be no scontrol
        return [os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())]
    return result.stdout.split()


def split_attempt(events: Sequence[Event]) -> tuple[Sequence[Event], Sequence[Event]]:
    """What has happened before this attempt of the job, and in it: from its `allocated` on."""
    begin = last_index(events, "allocated")
    this = {"requeues": 0, **slurm_job(), "job": job_id()}
    if begin < 0 or any(events[begin].get(key) != value for key, value in this.items()):
        return events, []
    return events[:begin], events[begin:]


def errors_of_attempt(run_dir: Path, attempt: Sequence[Event]) -> list[RankError]:
    """How its ranks have failed, in their own words."""
    folders = start_folders(run_dir)
    return read_errors(folders[-1]) if attempt and len(folders) > attempt[0]["earlier_starts"] else []


def record_restart(path: Path, reason: str) -> None:
    """Raises CheckpointError where it cannot be: a restart that is not counted could be repeated for ever."""
    before = len(read_events(path))
    EventLog(path).write("requeued", job=job_id(), reason=reason)
    if len(read_events(path)) == before:
        raise CheckpointError(
            f"{path} cannot be written, so the job is not requeued; make room there and submit it again ({reason})"
        )


def decide(
    earlier: Sequence[Event],
    attempt: Sequence[Event],
    errors: Sequence[RankError],
    exit_code: int,
    told: str | None,
    max_restarts: int,
) -> Decision:
    """How the job goes on.

    `earlier` and `attempt` are what has happened before and in this attempt, `errors` those of its ranks, `exit_code`
    is srun's, and `told` is why Slurm has announced the end of the job, if it has.
    """
    ended = next((event for event in attempt if event["event"] == "ended"), None)
    outcome = ended and ended["outcome"]
    if outcome == FINISHED or (exit_code == 0 and told is None):
        return Decision(0, "the run is finished")
    hopeless = [error for error in errors if not error.follows and not error.restart_helps]
    if hopeless:
        causes = "; ".join(f"{error}: {error.message}" for error in root_causes(hopeless))
        return Decision(USER_ERROR_EXIT_CODE, f"{causes} (no restart would help, so the job ends)")
    if outcome == INTERRUPTED and told is None:
        return Decision(INTERRUPTED_EXIT_CODE, f"the ranks were asked to end: {ended and ended['reason']}")
    if exit_code == USER_ERROR_EXIT_CODE:
        return Decision(exit_code, "a rank has ended with an error that no restart would help, see above; the job ends")
    events = [*earlier, *attempt]
    reason = told or describe_fault(errors, exit_code)
    restarts = sum(event["event"] == "requeued" for event in events[last_index(events, "saved") + 1 :])
    if restarts >= max_restarts:
        return Decision(
            FAULT_EXIT_CODE,
            f"{restarts} restarts in a row have saved no newer checkpoint, so the job ends; the last time {reason}. "
            "Once this is mended, the same sbatch command continues the run",
        )
    return Decision(RESTART_EXIT_CODE, reason)


def last_index(events: Sequence[Event], name: str) -> int:
    """Of the last event of this name; -1 if there is none."""
    return max((index for index, event in enumerate(events) if event["event"] == name), default=-1)


def describe_fault(errors: Sequence[RankError], exit_code: int) -> str:
    if errors and not errors[0].follows:
        return f"{errors[0]}: {errors[0].message}"
    killed = (
        "a rank was killed, or its node was lost" if errors or exit_code != FAULT_EXIT_CODE else "a rank has failed"
    )
    return f"{killed} (srun ended with code {exit_code})"


if __name__ == "__main__":
    main()
