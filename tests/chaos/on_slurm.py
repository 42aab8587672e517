"""Kinds of faults of a training that runs as a job of Slurm, which requeues itself where that helps."""

from __future__ import annotations

import errno
import signal

from slurm.cluster import dead_node, state, wait_for

from chaos.attempt import ForkedStart, Start, wait_until
from chaos.faults import FINISHED, MESSAGE, SAVED, Case, Duplicate, Fault, Injected, Strike, draw_moment, signalling
from chaos.plan import RELEASE, STEP
from kraken_train.run.events import read_events

VICTIM = ("train-slurm",)


class DeadNode(Fault):
    """A node loses its power, with the rank on it, and comes back once Slurm has requeued the job."""

    def __init__(self) -> None:
        super().__init__("slurm-dead-node", VICTIM, {FINISHED})

    def strike(self, case: Case) -> Strike:
        return Strike(*draw_moment(case, only=STEP), "hold", {})

    def during(self, case: Case, start: Start | ForkedStart) -> list[str]:
        wait_until(lambda: case.has_struck or not start.is_running())
        if not case.has_struck:
            return []
        events = read_events(case.work / "run" / "events.jsonl")
        (job,) = (event["job"] for event in events if event["event"] == "submitted")
        with dead_node("n2"):
            (case.control / RELEASE).touch()
            wait_for("the requeued job", lambda: state(job) == "PENDING")
        return []


ON_SLURM: list[Fault] = [
    signalling("slurm-kill-rank", VICTIM, {FINISHED}, "self", signal.SIGKILL),
    signalling("slurm-stop-rank", VICTIM, {FINISHED}, "self", signal.SIGSTOP),
    Injected("slurm-cancel", VICTIM, {SAVED}, "cancel job", only=STEP),
    Injected(
        "slurm-nan-gradient", VICTIM, {MESSAGE, FINISHED}, "spoil gradient", lambda draw: {"factor": "nan"}, only=STEP
    ),
    Injected("slurm-read-only", VICTIM, {MESSAGE, FINISHED}, "refuse files", lambda draw: {"error": errno.EROFS}),
    Duplicate("slurm-duplicate", VICTIM),
    DeadNode(),
]
