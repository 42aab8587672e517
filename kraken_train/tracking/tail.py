"""A file of JSON objects, one per line, that is read while another process appends to it or replaces it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


class Tail:
    """What has been added since the last time. After `when_replaced`, a replaced file is read from its start."""

    def __init__(self, path: Path, when_replaced: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.when_replaced = when_replaced
        self.file: BinaryIO | None = None

    def read(self) -> Iterator[dict[str, Any]]:
        """The objects of all lines that are complete and new; lines that are no JSON object are left out."""
        file = self.current()
        if file is None:
            return
        while (line := file.readline()).endswith(b"\n"):
            try:
                value = json.loads(line)
            except ValueError:  # no JSON, or no UTF-8
                continue
            if isinstance(value, dict):
                yield value
        file.seek(-len(line), os.SEEK_CUR)  # the beginning of a line that is still being written

    def current(self) -> BinaryIO | None:
        """The file that has the name now; None while there is none."""
        try:
            there = self.path.stat()
            # An open file keeps its number to itself, so one that was renamed over it has another.
            if self.file is None:
                self.file = self.path.open("rb")
            elif not os.path.samestat(there, os.fstat(self.file.fileno())):
                self.file.close()
                self.file = self.path.open("rb")
                self.when_replaced()
        except FileNotFoundError:
            pass
        return self.file
