"""How a launch has ended, in one message and one exit code: the failing rank's own, not those that follow from it."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

from kraken_train.common.cli import FAULT_EXIT_CODE, USER_ERROR_EXIT_CODE
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.run.rank_errors import read_errors, root_causes
from launch.node import Plan

OWN_WORDS = re.compile(r"error: .+|(?:\w+\.)*\w*(?:Error|Exception)(?:: .+)?")  # ours, or a traceback's last line
FOLLOWS = "see its message"  # in what is said of another rank's end
NOT_ANSWERING = "has not answered"  # in what the watchdog says of a rank, which it then kills
WORDS_KEPT = 100


@dataclass
class Words:
    """What ranks have said of errors, the first ones; nodes add from threads of their own."""

    lines: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    latest: str = ""  # whatever it was about

    def hear(self, line: str) -> None:
        self.latest = line = line.strip()
        if OWN_WORDS.fullmatch(line) and FOLLOWS not in line:
            with self.lock:
                if line not in self.lines and len(self.lines) < WORDS_KEPT:
                    self.lines.append(line)

    def about_silence(self) -> list[str]:
        return [line for line in self.lines if NOT_ANSWERING in line]


@dataclass(frozen=True)
class Verdict:
    exit_code: int
    messages: list[str]  # the root cause first; none where nothing has failed


def judge(plan: Plan, codes: dict[str, int], words: Words, asked: bool) -> Verdict:
    """From each host's exit code, what was said, and what the ranks have left in the run's folder in this start.

    `asked`: whether the launcher was asked to end.
    """
    failed = {host: code for host, code in codes.items() if code}
    start = plan.newest_start()
    errors = [error for error in (read_errors(start) if start else []) if not error.follows]
    if not failed:
        return Verdict(0, [])
    if errors:
        silence = words.about_silence()
        # A rank that the watchdog has killed is named by it, with the reason.
        causes = root_causes([e for e in errors if not any(str(e) in line or e.message in line for line in silence)])
        return Verdict(
            FAULT_EXIT_CODE if errors[0].restart_helps else USER_ERROR_EXIT_CODE,
            silence + [f"error: {cause}: {cause.message}" for cause in causes],
        )
    if asked or set(failed.values()) == {INTERRUPTED_EXIT_CODE}:
        return Verdict(INTERRUPTED_EXIT_CODE, [])
    code = USER_ERROR_EXIT_CODE if USER_ERROR_EXIT_CODE in failed.values() else FAULT_EXIT_CODE
    ends = ", ".join(f"{host} with exit code {code}" for host, code in failed.items())
    return Verdict(code, words.about_silence() or words.lines[:1] or [f"error: the ranks have ended on {ends}"])
