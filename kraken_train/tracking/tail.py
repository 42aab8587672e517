"""A file of JSON objects, one per line, that is read while another process appends to it or replaces it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from kraken_train.common.files import open_file
from kraken_train.common.parsing import parse_mapping


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
            with suppress(ValueError):  # it is no JSON object
                yield parse_mapping(line)
        file.seek(-len(line), os.SEEK_CUR)  # the beginning of a line that is still being written

    def current(self) -> BinaryIO | None:
        """The file that has the name now; None while there is none."""
        try:
            there = self.path.stat()
            # An open file keeps its number to itself, so one that was renamed over it has another.
            if self.file is None:
                self.file = open_file(self.path)
            elif not os.path.samestat(there, os.fstat(self.file.fileno())):
                replacement = open_file(self.path)
                self.file.close()
                self.file = replacement
                self.when_replaced()
        except OSError:  # it is missing, or no file
            pass
        return self.file
