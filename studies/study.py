"""What a study is to the code that all studies share: how its runs are trained, and where their results stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """A training of a study."""

    arm: str  # what is trained: a line of text that the study reads
    seed: int

    @property
    def name(self) -> str:
        """The folder of the run; what shares an arm shares its runs."""
        return f"{self.arm.replace(' ', ',')},seed={self.seed}"


@dataclass(frozen=True)
class Study:
    # arguments of `program` without folders; raises ConfigError for an unknown arm
    overrides: Callable[[Run], list[str]]
    program: str  # module that trains, with the settings of kraken_train.train
    record: Path  # results of finished runs, as JSON lines
    readme: str  # says how data are prepared, for messages
