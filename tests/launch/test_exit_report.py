"""The last messages and the exit code of a launch."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_program import make_plan

from kraken_train.run.rank_errors import RankError, record_error
from launch.exit_report import ErrorLines, diagnose, mark_aborted_followers


def rank_error(rank: int, message: str, follows: bool = False, restart_helps: bool = False) -> RankError:
    return RankError(f"2026-01-01T00:00:0{rank}", rank, "n1", 10 + rank, message, None, follows, restart_helps)


def printed(*lines: str) -> ErrorLines:
    error_lines = ErrorLines()
    for line in lines:
        error_lines.add(line)
    return error_lines


def test_the_root_cause_is_reported(tmp_path: Path) -> None:
    """Neither an error of an earlier start, nor one that another rank's failure caused."""
    plan = make_plan(tmp_path, run_dir=str(tmp_path), earlier_starts=1)
    for number in (1, 2):
        (tmp_path / "starts" / f"000{number}" / "errors").mkdir(parents=True)
    record_error(tmp_path / "starts" / "0001", rank_error(0, "of an earlier start"))
    start = tmp_path / "starts" / "0002"
    consequence = "another rank has ended, see its message; the same command continues"
    record_error(start, rank_error(0, consequence, follows=True, restart_helps=True))
    error_lines = printed(f"error: {consequence}")
    assert diagnose(plan, {"n1": 1}, error_lines, False).messages == ["error: ranks failed on n1 (exit code 1)"]
    record_error(start, rank_error(3, "the disk is full"))
    report = diagnose(plan, {"n1": 1, "n2": 1}, error_lines, stop_requested=False)
    assert (report.exit_code, report.messages) == (2, ["error: rank 3 (process 13 on n1): the disk is full"])


def test_the_watchdogs_message_comes_before_its_kill(tmp_path: Path) -> None:
    """The watchdog kills a rank that hangs, so the SIGKILL is not the root cause."""
    (tmp_path / "starts" / "0001" / "errors").mkdir(parents=True)
    record_error(tmp_path / "starts" / "0001", rank_error(1, "was killed by SIGKILL", restart_helps=True))
    line = "error: rank 1 (process 11 on n1) has not answered for 45 s; the job is ended"
    plan = make_plan(tmp_path, run_dir=str(tmp_path))
    report = diagnose(plan, {"n1": 1}, printed(line), stop_requested=False)
    assert (report.exit_code, report.messages) == (1, [line])


def test_a_rank_that_pytorch_aborts_is_not_the_cause(tmp_path: Path) -> None:
    """NCCL's error about the rank that was killed on another host ends the process before it can report that."""
    (tmp_path / "starts" / "0001" / "errors").mkdir(parents=True)
    plan = make_plan(tmp_path, run_dir=str(tmp_path))
    aborted = rank_error(1, "was killed by SIGABRT", restart_helps=True)
    line = (
        "[rank1]:[E1010 06:10:06 ProcessGroupNCCL.cpp:2059] [PG ID 0 Rank 1] Process group watchdog thread terminated "
        "with exception: NCCL error: remote process exited or there was a network error, NCCL version 2.28.9"
    )
    record_error(tmp_path / "starts" / "0001", aborted)
    killed = rank_error(2, "was killed by SIGKILL", restart_helps=True)
    record_error(tmp_path / "starts" / "0001", killed)
    causes = {error: f"error: {error}: {error.message}" for error in (aborted, killed)}
    for lines, expected in ((printed(), [causes[aborted], causes[killed]]), (printed(line), [causes[killed]])):
        mark_aborted_followers(plan, lines)
        assert diagnose(plan, {"n1": 1}, lines, stop_requested=False).messages == expected


@pytest.mark.parametrize(
    ("exit_codes", "lines", "stop_requested", "code", "messages"),
    [
        ({"a": 0, "b": 0}, ["error: printed earlier"], False, 0, []),
        ({"a": 143, "b": 143}, [], False, 143, []),
        ({"a": 1, "b": 0}, [], True, 143, []),
        ({"a": 2}, ["error: seed=-1 must be", "error: [rank 1] seed=-1"], False, 2, ["error: seed=-1 must be"]),
        ({"a": 1}, ["Traceback (most", "ImportError: no module"], False, 1, ["ImportError: no module"]),
        ({"a": 0, "b": 1}, [], False, 1, ["error: ranks failed on b (exit code 1)"]),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    exit_codes: dict[str, int],
    lines: list[str],
    stop_requested: bool,
    code: int,
    messages: list[str],
) -> None:
    report = diagnose(make_plan(tmp_path), exit_codes, printed(*lines), stop_requested)
    assert (report.exit_code, report.messages) == (code, messages)
