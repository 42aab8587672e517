"""Progress: a line that is redrawn on a terminal, a line every ten seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console

PLAIN_INTERVAL = 10.0  # seconds
TERMINAL_INTERVAL = 0.2


class Progress:
    """Counts documents, text bytes and tokens of one phase of the work. A context manager.

    `fraction()` says how much of the phase is done, from 0 to 1, for the time that is left.
    """

    def __init__(self, phase: str, fraction: Callable[[], float] | None = None) -> None:
        self.phase = phase
        self._fraction = fraction
        self._first_fraction: float | None = None  # a continued attempt does not begin at 0
        self.documents = self.text_bytes = self.tokens = 0
        self._console = Console(stderr=True)
        self._status = self._console.status(phase) if self._console.is_terminal else None
        self._interval = TERMINAL_INTERVAL if self._status else PLAIN_INTERVAL
        self._started = self._shown = time.monotonic()

    def add(self, documents: int, text_bytes: int, tokens: int = 0) -> None:
        if self._fraction and self._first_fraction is None:
            self._first_fraction = self._fraction()
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            seconds = now - self._started
            self._show(self.line(seconds) + self.time_left(seconds))

    def line(self, seconds: float) -> str:
        per_second = 1 / max(seconds, 1e-9)
        line = (
            f"{self.phase}: {self.documents:,} documents, {self.text_bytes / 1e6:,.1f} MB, "
            f"{self.documents * per_second:,.0f} documents/s"
        )
        if self.tokens:
            line += f", {self.tokens:,} tokens, {self.tokens * per_second:,.0f} tokens/s"
        return line

    def time_left(self, seconds: float) -> str:
        if self._fraction is None or self._first_fraction is None:
            return ""
        fraction = self._fraction()
        progress = fraction - self._first_fraction
        if progress <= 0:
            return ""
        return f", {100 * fraction:.1f}%, {_duration(seconds * (1 - fraction) / progress)} left"

    def _show(self, line: str) -> None:
        if self._status:
            self._status.update(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()
        if kind is None:
            print(self.line(time.monotonic() - self._started), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """`3:07:00` or `7:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
