"""How the ranks of a start have failed, in files of their own: RUN_DIR/starts/0001/errors/rank-0000.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from kraken_train.common.errors import ConfigError
from kraken_train.common.files import read_file
from kraken_train.common.parsing import parse_mapping
from kraken_train.common.settings import from_dict
from kraken_train.run.layout import ERRORS


@dataclass(frozen=True)
class RankError:
    """Why a rank failed: its own message, or that of its launcher if it left none."""

    time: str
    rank: int
    host: str
    pid: int
    message: str  # for people
    traceback: str | None  # of what is not a user's mistake
    follows: bool  # it failed only because another rank failed
    restart_helps: bool  # whether the same command may succeed next time

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def error_file(folder: Path, rank: int) -> Path:
    return folder / ERRORS / f"rank-{rank:04d}.json"


def record_error(folder: Path, error: RankError) -> None:
    """Write it to the folder of its start; print a message if that cannot be written."""
    try:
        error_file(folder, error.rank).write_text(json.dumps(asdict(error), indent=1), encoding="utf-8")
    except OSError as problem:
        print(f"note: rank {error.rank}'s error cannot be kept: {problem}", file=sys.stderr, flush=True)


def read_errors(folder: Path) -> list[RankError]:
    """How the ranks of a start have failed: root causes first, then their consequences, each in the order of time."""
    errors = []
    for path in (folder / ERRORS).glob("rank-*.json"):
        try:
            errors.append(from_dict(parse_mapping(read_file(path)), RankError))
        except (OSError, ValueError, ConfigError):  # cut short when its rank was killed
            continue
    return sorted(errors, key=lambda error: (error.follows, error.time))


def root_causes(errors: list[RankError]) -> list[RankError]:
    """The root causes among the results of `read_errors`, each message once; all, if every one is a consequence."""
    causes = [error for error in errors if not error.follows] or errors
    return list({error.message: error for error in reversed(causes)}.values())[::-1]
