"""What the batch script is told to do after its ranks have ended, from what they have left in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_here, user_error
from integration.training import overrides

from kraken_train.run.events import Event, read_events
from kraken_train.run.rank_errors import RankError
from launch.restart import RESTART_EXIT_CODE, TOLD, decide

STARTED = {"event": "started", "step": 0}
SAVED = {"event": "saved", "step": 4}
REQUEUED = {"event": "requeued"}
FINISHED = {"event": "ended", "outcome": "finished", "reason": None}
INTERRUPTED = {"event": "ended", "outcome": "interrupted", "reason": "SIGTERM"}
FAILED = {"event": "ended", "outcome": "failed", "reason": "another rank has ended"}
OWN = RankError("1", 1, "node-2", 7, "a device has failed", "Traceback", follows=False, restart_helps=True)
FOLLOWS = RankError("2", 0, "node-1", 6, "another rank has ended", None, follows=True, restart_helps=True)
HOPELESS = RankError("3", 2, "node-3", 8, "the disk is full", None, follows=False, restart_helps=False)


@pytest.mark.parametrize(
    ("earlier", "attempt", "errors", "exit_code", "told", "expected", "words"),
    [
        ([], [STARTED, SAVED, FINISHED], [], 0, "", 0, "finished"),
        ([], [STARTED, SAVED, FINISHED], [], 1, "limit", 0, "finished"),  # and then something else
        ([], [STARTED, SAVED, INTERRUPTED], [], 143, "limit", RESTART_EXIT_CODE, "the time limit is near"),
        ([], [], [], 0, "limit", RESTART_EXIT_CODE, "the time limit is near"),  # before there were ranks
        ([], [STARTED, SAVED, INTERRUPTED], [], 143, "", 143, "asked to end: SIGTERM"),
        ([], [STARTED, SAVED, INTERRUPTED], [], 143, "preempted", RESTART_EXIT_CODE, "Slurm has preempted the job"),
        ([], [STARTED, FAILED], [FOLLOWS], 143, "", RESTART_EXIT_CODE, "a rank was killed"),
        (
            [],
            [STARTED, FAILED],
            [OWN, FOLLOWS],
            143,
            "",
            RESTART_EXIT_CODE,
            "rank 1 (process 7 on node-2): a device",
        ),
        # 143 of a bystander hides the 2 of the rank that tells; what this has written does not.
        ([], [STARTED, FAILED], [HOPELESS, FOLLOWS], 143, "", 2, "rank 2 (process 8 on node-3): the disk is full"),
        ([], [STARTED, FAILED], [OWN, HOPELESS], 1, "limit", 2, "the disk is full"),
        ([], [], [], 2, "", 2, "no restart would help"),  # as on a full disk, which takes no error's file
        ([STARTED, SAVED], [], [], 1, "", RESTART_EXIT_CODE, "a rank has failed"),
        # Three restarts in a row without a newer checkpoint are enough; one with it begins anew.
        ([REQUEUED] * 2, [STARTED], [], 137, "", RESTART_EXIT_CODE, "a rank was killed"),
        ([REQUEUED] * 3, [STARTED], [], 137, "", 1, "3 restarts in a row have saved no newer checkpoint"),
        ([REQUEUED] * 3, [STARTED, SAVED], [], 137, "", RESTART_EXIT_CODE, "a rank was killed"),
        ([SAVED, *[REQUEUED] * 3], [STARTED], [], 143, "limit", 1, "the last time the time limit is near"),
    ],
)
def test_decision(
    earlier: list[Event], attempt: list[Event], errors: list[RankError], exit_code: int, told: str,
    expected: int, words: str,
) -> None:  # fmt: skip
    decision = decide(earlier, attempt, errors, exit_code, TOLD[told], max_restarts=3)
    assert decision.exit_code == expected and words in decision.message


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "here"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("job")
def test_before_and_after(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    settings = overrides(data, run)

    def after(code: int) -> tuple[int, str]:
        options = ["--exit-code", str(code), "--told", "", "--max-restarts", "1"]
        result = run_here("launch.restart", "after", *options, *settings)
        return result.returncode, result.stdout + result.stderr

    bad = "parallel.sub_layer_parallel_size=4"
    assert "does not divide the 2 ranks" in user_error(
        run_here("launch.restart", "before", "--ranks", "2", *settings, bad)
    )
    assert "does not exist" in user_error(
        run_here("launch.restart", "before", "--ranks", "2", *overrides(tmp_path / "none", run))
    )
    assert not run.exists()

    assert run_here("launch.restart", "before", "--ranks", "2", *settings).returncode == 0
    errors = run / "starts" / "0001" / "errors"
    errors.mkdir(parents=True)
    assert after(137)[0] == RESTART_EXIT_CODE
    assert [event["event"] for event in read_events(run / "events.jsonl")] == ["allocated", "requeued"]

    # The same folder is no error of the next attempt, which has none of its own yet.
    (errors / "rank-0000.json").write_text(json.dumps(HOPELESS.__dict__))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, said = after(1)
    assert code == 1 and "1 restarts in a row" in said and "disk" not in said
    (run / "run.json").unlink(missing_ok=True)


@pytest.mark.usefixtures("job")
def test_a_restart_that_cannot_be_counted_is_none(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "events.jsonl").mkdir(parents=True)  # as on a full disk: nothing can be added
    result = run_here(
        "launch.restart", "after", "--exit-code", "1", "--told", "", "--max-restarts", "3", *overrides(data, run)
    )
    assert result.returncode == 2 and "cannot be" in result.stderr
