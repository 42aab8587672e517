"""Progress: a line that is redrawn on a terminal, a line every ten seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console

PLAIN_INTERVAL = 10.0  # seconds
TERMINAL_INTERVAL = 0.2


class Progress:
    """Counts documents, text bytes and tokens of one phase of the work. A context manager."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.documents = self.text_bytes = self.tokens = 0
        self._console = Console(stderr=True)
        self._status = self._console.status(phase) if self._console.is_terminal else None
        self._interval = TERMINAL_INTERVAL if self._status else PLAIN_INTERVAL
        self._started = self._shown = time.monotonic()

    def add(self, documents: int, text_bytes: int, tokens: int = 0) -> None:
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            self._show(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        line = f"{self.phase}: {self.documents:,} documents, {self.text_bytes / 1e6:,.1f} MB"
        if self.tokens:
            line += f", {self.tokens:,} tokens, {self.tokens / max(seconds, 1e-9):,.0f} tokens/s"
        return line

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
