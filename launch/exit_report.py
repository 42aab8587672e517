"""What a launch prints last and the exit code that it returns: the error of the rank that failed first.

Errors of other ranks that only follow from the first one are left out.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field, replace

from kraken_train.common.cli import FAULT_EXIT_CODE, USER_ERROR_EXIT_CODE
from kraken_train.common.lost_peer import rank_that_lost_a_peer
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.run.rank_errors import read_errors, record_error, root_causes
from launch.plan import Plan

# One of our error messages, or the last line of a traceback.
ERROR_LINE = re.compile(r"error: .+|(?:\w+\.)*\w*(?:Error|Exception)(?:: .+)?")
CAUSED_BY_ANOTHER_RANK = "see its message"  # part of the message of a rank that ends because another rank failed
NOT_ANSWERING = "has not answered"  # part of the watchdog's message about a rank that it then kills
ABORTED = "was killed by SIGABRT"  # as `launch.node` records it
MAX_ERROR_LINES = 100


@dataclass
class ErrorLines:
    """The first error messages that the ranks printed. Thread-safe: a thread per node adds to it."""

    lines: list[str] = field(default_factory=list)
    lost_a_peer: set[int] = field(default_factory=set)  # ranks of which PyTorch says so before it aborts them
    lock: threading.Lock = field(default_factory=threading.Lock)
    last_printed: str = ""  # the last line of any kind

    def add(self, line: str) -> None:
        """Keep a printed line if it is an error message that no other rank's failure caused."""
        self.last_printed = line = line.strip()
        rank = rank_that_lost_a_peer(line)
        if rank is not None:
            with self.lock:
                self.lost_a_peer.add(rank)
        if ERROR_LINE.fullmatch(line) and CAUSED_BY_ANOTHER_RANK not in line:
            with self.lock:
                if line not in self.lines and len(self.lines) < MAX_ERROR_LINES:
                    self.lines.append(line)

    def from_watchdog(self) -> list[str]:
        return [line for line in self.lines if NOT_ANSWERING in line]


@dataclass(frozen=True)
class ExitReport:
    exit_code: int
    messages: list[str]  # the root cause first; empty if nothing failed


def mark_aborted_followers(plan: Plan, error_lines: ErrorLines) -> None:
    """Record which ranks PyTorch has aborted because another one has ended; they could not report that themselves."""
    start = plan.newest_start()
    if start is None:
        return
    for error in read_errors(start):
        if error.message == ABORTED and error.rank in error_lines.lost_a_peer:
            record_error(start, replace(error, follows=True))


def diagnose(plan: Plan, exit_codes: dict[str, int], error_lines: ErrorLines, stop_requested: bool) -> ExitReport:
    """Find the root cause from each host's exit code, the printed errors, and the error files of this launch.

    `stop_requested`: whether the launcher received a signal to end.
    """
    failed = {host: code for host, code in exit_codes.items() if code}
    start = plan.newest_start()
    errors = [error for error in (read_errors(start) if start else []) if not error.follows]
    if not failed:
        return ExitReport(0, [])
    if errors:
        watchdog = error_lines.from_watchdog()
        # The watchdog's message already names a rank that it killed, with the reason.
        causes = root_causes([e for e in errors if not any(str(e) in line or e.message in line for line in watchdog)])
        return ExitReport(
            FAULT_EXIT_CODE if errors[0].restart_helps else USER_ERROR_EXIT_CODE,
            watchdog + [f"error: {cause}: {cause.message}" for cause in causes],
        )
    if stop_requested or set(failed.values()) == {INTERRUPTED_EXIT_CODE}:
        return ExitReport(INTERRUPTED_EXIT_CODE, [])
    code = USER_ERROR_EXIT_CODE if USER_ERROR_EXIT_CODE in failed.values() else FAULT_EXIT_CODE
    ends = ", ".join(f"{host} (exit code {code})" for host, code in failed.items())
    return ExitReport(code, error_lines.from_watchdog() or error_lines.lines[:1] or [f"error: ranks failed on {ends}"])
