"""Whether Slurm should requeue a training job after its ranks have ended, decided from the files in the run's folder.

srun's exit code is the highest of its tasks'. Therefore it may hide the exit code of the rank that failed first: the
143 of a rank that was only stopped is higher than 2. So an exit code of 2 is reliable, but any other one is not, and
the events and error files in the run's folder are read first.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.cli import FAULT_EXIT_CODE, USER_ERROR_EXIT_CODE
from kraken_train.common.errors import CheckpointError
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.parallel.ranks import slurm_job
from kraken_train.run.events import FINISHED, INTERRUPTED, Event, EventLog, read_events
from kraken_train.run.layout import start_folders
from kraken_train.run.rank_errors import RankError, read_errors, root_causes

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True)
class Decision:
    """How the job ends."""

    exit_code: int
    message: str


def decide(
    earlier: Sequence[Event],
    attempt: Sequence[Event],
    errors: Sequence[RankError],
    exit_code: int,
    slurm_reason: str | None,
    max_restarts: int,
) -> Decision:
    """How the job ends.

    `earlier` and `attempt` are the events before this attempt of the job and of this attempt, `errors` those of its
    ranks, `exit_code` is srun's, and `slurm_reason` says why Slurm ends the job, if it does.
    """
    ended = next((event for event in attempt if event["event"] == "ended"), None)
    outcome = ended and ended["outcome"]
    if outcome == FINISHED or (exit_code == 0 and slurm_reason is None):
        return Decision(0, "the run is finished")
    permanent = [error for error in errors if not error.follows and not error.restart_helps]
    if permanent:
        causes = "; ".join(f"{error}: {error.message}" for error in root_causes(permanent))
        return Decision(USER_ERROR_EXIT_CODE, f"{causes} (a restart would not help, so the job ends)")
    if outcome == INTERRUPTED and slurm_reason is None:
        return Decision(INTERRUPTED_EXIT_CODE, f"the ranks were asked to end: {ended and ended['reason']}")
    if exit_code == USER_ERROR_EXIT_CODE:
        return Decision(exit_code, "a rank failed, see above; a restart would not help, so the job ends")
    events = [*earlier, *attempt]
    reason = slurm_reason or describe_fault(errors, exit_code)
    restarts = sum(event["event"] == "requeued" for event in events[last_index(events, "saved") + 1 :])
    if restarts >= max_restarts:
        return Decision(
            FAULT_EXIT_CODE,
            f"{restarts} restarts in a row have saved no newer checkpoint, so the job ends; the last reason: "
            f"{reason}. Once this is repaired, the same sbatch command continues the run",
        )
    return Decision(REQUEUE_EXIT_CODE, reason)


def describe_fault(errors: Sequence[RankError], exit_code: int) -> str:
    if errors and not errors[0].follows:
        return f"{errors[0]}: {errors[0].message}"
    fault = "a rank was killed, or its node was lost" if errors or exit_code != FAULT_EXIT_CODE else "a rank failed"
    return f"{fault} (srun ended with exit code {exit_code})"


def split_attempt(events: Sequence[Event]) -> tuple[Sequence[Event], Sequence[Event]]:
    """The events before this attempt of the job, and those of this attempt, which begin with `allocated`."""
    begin = last_index(events, "allocated")
    attempt = {"requeues": 0, **slurm_job(), "job": job_id()}
    if begin < 0 or any(events[begin].get(key) != value for key, value in attempt.items()):
        return events, []
    return events[:begin], events[begin:]


def last_index(events: Sequence[Event], name: str) -> int:
    """The index of the last event of this name; -1 if there is none."""
    return max((index for index, event in enumerate(events) if event["event"] == name), default=-1)


def read_attempt_errors(run_dir: Path, attempt: Sequence[Event]) -> list[RankError]:
    """The errors of the ranks that this attempt started; [] if it started none."""
    folders = start_folders(run_dir)
    return read_errors(folders[-1]) if attempt and len(folders) > attempt[0]["earlier_starts"] else []


def record_requeue(path: Path, reason: str) -> None:
    """Record the requeue as an event. Raises CheckpointError if that fails: the limit of restarts counts them."""
    before = len(read_events(path))
    EventLog(path).write("requeued", job=job_id(), reason=reason)
    if len(read_events(path)) == before:
        raise CheckpointError(
            f"{path} cannot be written, so the job is not requeued; make room there and submit it again ({reason})"
        )


def record_allocation(run_dir: Path, path: Path) -> None:
    """Record that Slurm has started an attempt of this job."""
    starts = len(start_folders(run_dir))
    details = {"requeues": 0, **slurm_job(), "job": job_id(), "nodes": node_names(), "earlier_starts": starts}
    EventLog(path).write("allocated", **details)


def job_id() -> str:
    """The id of the job as Slurm prints it: JOB, or ARRAY_TASK for a job of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def node_names() -> list[str]:
    try:
        result = subprocess.run(
            ["scontrol", "show", "hostnames"], capture_output=True, encoding="utf-8", errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):  # a container may have no scontrol
        return [os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())]
    return result.stdout.split()
