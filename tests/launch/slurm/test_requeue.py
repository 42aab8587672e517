"""The decision to requeue a job, from the events and errors of its ranks."""

from __future__ import annotations

import pytest

from kraken_train.run.events import Event
from kraken_train.run.rank_errors import RankError
from launch.restart import SLURM_REASONS
from launch.slurm.requeue import REQUEUE_EXIT_CODE, decide

STARTED = {"event": "started", "step": 0}
SAVED = {"event": "saved", "step": 4}
REQUEUED = {"event": "requeued"}
FINISHED = {"event": "ended", "outcome": "finished", "reason": None}
INTERRUPTED = {"event": "ended", "outcome": "interrupted", "reason": "SIGTERM"}
FAILED = {"event": "ended", "outcome": "failed", "reason": "another rank has ended"}
OWN = RankError("1", 1, "node-2", 7, "a device has failed", "Traceback", follows=False, restart_helps=True)
FOLLOWS = RankError("2", 0, "node-1", 6, "another rank has ended", None, follows=True, restart_helps=True)
PERMANENT = RankError("3", 2, "node-3", 8, "the disk is full", None, follows=False, restart_helps=False)


@pytest.mark.parametrize(
    ("earlier", "attempt", "errors", "exit_code", "slurm_reason", "expected", "message"),
    [
        ([], [STARTED, SAVED, FINISHED], [], 0, "", 0, "finished"),
        ([], [STARTED, SAVED, FINISHED], [], 1, "limit", 0, "finished"),  # a rank failed after its end
        ([], [STARTED, SAVED, INTERRUPTED], [], 143, "limit", REQUEUE_EXIT_CODE, "the time limit is near"),
        ([], [], [], 0, "limit", REQUEUE_EXIT_CODE, "the time limit is near"),  # before the ranks were started
        ([], [STARTED, SAVED, INTERRUPTED], [], 143, "", 143, "asked to end: SIGTERM"),
        ([], [STARTED, SAVED, INTERRUPTED], [], 143, "preempted", REQUEUE_EXIT_CODE, "Slurm has preempted the job"),
        ([], [STARTED, FAILED], [FOLLOWS], 143, "", REQUEUE_EXIT_CODE, "a rank was killed"),
        (
            [],
            [STARTED, FAILED],
            [OWN, FOLLOWS],
            143,
            "",
            REQUEUE_EXIT_CODE,
            "rank 1 (process 7 on node-2): a device",
        ),
        # The 143 of a stopped rank hides the 2 of the rank that failed, but that rank's error file does not.
        ([], [STARTED, FAILED], [PERMANENT, FOLLOWS], 143, "", 2, "rank 2 (process 8 on node-3): the disk is full"),
        ([], [STARTED, FAILED], [OWN, PERMANENT], 1, "limit", 2, "the disk is full"),
        ([], [], [], 2, "", 2, "restart would not help"),  # on a full disk no error file is written
        ([STARTED, SAVED], [], [], 1, "", REQUEUE_EXIT_CODE, "a rank failed"),
        # At most three restarts in a row without a newer checkpoint; a newer checkpoint resets the count.
        ([REQUEUED] * 2, [STARTED], [], 137, "", REQUEUE_EXIT_CODE, "a rank was killed"),
        ([REQUEUED] * 3, [STARTED], [], 137, "", 1, "3 restarts in a row have saved no newer checkpoint"),
        ([REQUEUED] * 3, [STARTED, SAVED], [], 137, "", REQUEUE_EXIT_CODE, "a rank was killed"),
        ([SAVED, *[REQUEUED] * 3], [STARTED], [], 143, "limit", 1, "the last reason: the time limit is near"),
    ],
)
def test_decision(
    earlier: list[Event], attempt: list[Event], errors: list[RankError], exit_code: int,
    slurm_reason: str, expected: int, message: str,
) -> None:  # fmt: skip
    decision = decide(earlier, attempt, errors, exit_code, SLURM_REASONS[slurm_reason], max_restarts=3)
    assert decision.exit_code == expected
    assert message in decision.message
