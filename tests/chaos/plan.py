"""The fault of a process of a command: JSON in an environment variable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

VARIABLE = "KRAKEN_CHAOS"  # in the environment of every process of a case, so that those left over are found
# an optimizer step begins; a file operation is about to happen; the inference engine is to compute a further token
STEP, FILE, TOKEN = "step", "file", "token"
STRUCK, RELEASE = "struck.json", "release"  # files in the control folder


@dataclass(frozen=True)
class Plan:
    """Which event of which process the fault strikes at, and what it does there."""

    case: str  # its name
    watched: str  # the folder whose file operations count
    control: str  # the folder in which injection and harness leave word for each other
    module: str  # as in `python -m MODULE`: the process in which events are counted
    rank: int | None = 0  # None: every rank
    event: str = STEP
    number: int = 0  # of the event, from 1; 0: events are only counted
    action: str = ""  # one of chaos.injection.ACTIONS
    arguments: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def mark(case: str) -> str:
        """What `to_json` of every plan of this case contains."""
        return json.dumps({"case": case})[1:-1]

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))
