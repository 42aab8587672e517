"""What a run has logged: RUN_DIR/metrics.jsonl, one JSON object per logged step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard

from kraken_train.common.errors import DataError
from kraken_train.common.files import read_file
from kraken_train.common.parsing import find_wrong_type, parse_mapping

METRICS_FILE = "metrics.jsonl"
VALIDATION_LOSS = "validation_loss"
RMS = "rms"
SUITE = "suite"


def rms_key(kind: str, place: str) -> str:
    """The name of a root mean square, see `kraken_train.training.norms`."""
    return f"{RMS}/{kind}/{place}"


NUMBER = int | float | None  # None: it was not finite
TYPES: dict[str, type | UnionType] = {
    "step": int,
    "tokens": int,
    "global_batch_size": int,
    **dict.fromkeys(("loss", VALIDATION_LOSS, "tokens_per_second", "lr", "grad_norm"), NUMBER),
}


@dataclass(frozen=True)
class Run:
    label: str
    records: list[dict[str, Any]]  # in the order of steps

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the steps that logged a finite `key`."""
        points = [(r["step"], r[key]) for r in self.records if is_finite(r.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    def phase_begins(self) -> list[int]:
        """The first logged step of each phase after the first; empty for a run without phases."""
        pairs = pairwise(record for record in self.records if "phase" in record)
        return [after["step"] for before, after in pairs if before["phase"] != after["phase"]]

    def rms_places(self, kind: str) -> list[str]:
        """Where root mean squares of a kind were measured, in the order of the model."""
        prefix = rms_key(kind, "")
        keys = dict.fromkeys(key for record in self.records for key in record if key.startswith(prefix))
        return [key.removeprefix(prefix) for key in keys]

    def suite_scores(self) -> list[str]:
        """The keys of the scores of suites, of averages and of tasks, in the order of the first record with them."""
        return list(dict.fromkeys(key for record in self.records for key in record if key.startswith(f"{SUITE}/")))


def suite_key(name: str) -> str:
    """The name of the average of a suite, or of the score of a task."""
    return f"{SUITE}/{name}"


def is_finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(run_dir: Path) -> Run:
    """What the run logged; where a resumed run logged a step again, the later record counts. Raises DataError."""
    path = run_dir / METRICS_FILE
    try:
        lines = read_file(path).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name the run_dir of a training run") from error
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            by_step[record["step"]] = by_step.get(record["step"], {}) | record
        elif line.strip() and number < len(lines):  # the last line may be cut off: the run is still writing
            raise DataError(f"{path}:{number} is not a JSON object with a step; the file is damaged, remove that line")
    if not by_step:
        raise DataError(f"{path} holds no metrics yet; wait for the run's first logged step")
    return Run(run_dir.resolve().name, [by_step[step] for step in sorted(by_step)])


def parse_record(line: bytes) -> dict[str, Any] | None:
    """A logged step; None for what cannot be one."""
    try:
        record = parse_mapping(line)
    except ValueError:
        return None
    wrong = find_wrong_type(record, TYPES) or find_wrong_type(record, dict.fromkeys(validation_losses(record), NUMBER))
    return record if "step" in record and wrong is None else None


def validation_losses(record: dict[str, Any]) -> list[str]:
    """The names of the losses of further validation sets."""
    return [name for name in record if name.startswith(f"{VALIDATION_LOSS}/")]
