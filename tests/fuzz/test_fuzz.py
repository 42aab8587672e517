"""Damaged files of each kind end in success or in a KrakenError, within seconds and bounded memory.

`make fuzz` runs 10,000 cases (CASES=...) with a seed that it prints, `make test` a few that are always the same. Where
a case fails, hypothesis makes it smaller and prints the changes; `SEED=...` repeats the run.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from artefacts import ARTEFACTS, sign
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutations import Change, changes
from readers import READERS, clear_outputs
from worker import Answer, Worker

CASES = int(os.environ.get("FUZZ_CASES", "0"))  # of all kinds together; 0: a few of each
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FEW = 6
WEIGHTS = {"gpt2": 0.3}  # of the cases; its file is large, and its lines are all alike


def cases_of(kind: str) -> int:
    whole = sum(WEIGHTS.get(name, 1.0) for name in READERS)
    return max(1, round(CASES * WEIGHTS.get(kind, 1.0) / whole)) if CASES else FEW


class Case:
    """The folder of a case: a copy of a valid artefact, in a place of its own."""

    def __init__(self, kind: str, place: Path, worker: Worker) -> None:
        self.kind = kind
        self.valid = place / "valid"
        ARTEFACTS[kind](self.valid)
        self.folder = place / "case" / "folder"
        self.folder.parent.mkdir()
        self.files = sorted(path.relative_to(self.valid).as_posix() for path in self.valid.rglob("*") if path.is_file())
        self.worker = worker
        self.outcomes: Counter[str] = Counter()

    def read(self, damage: list[Change], signed: bool) -> Answer:
        """What comes of reading the folder with this damage, which `signed` checksums may cover."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.valid, self.folder)
        clear_outputs(self.folder)
        for change in damage:
            change.apply(self.folder)
        if signed:
            sign(self.folder)
        outcome, message = self.worker.read(self.kind, self.folder, limited=bool(damage))
        self.outcomes[outcome] += 1
        return outcome, message


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker("readers")
    yield made
    made.close()


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path, worker: Worker) -> Iterator[Case]:
    made = Case(request.param, tmp_path, worker)
    yield made
    print(f"{request.param}: {dict(made.outcomes)}")


@pytest.mark.parametrize("case", READERS, indirect=True)
def test_damaged_files(case: Case) -> None:
    outcome, whole = case.read([], signed=False)
    assert outcome == "read", whole

    def check(damage: list[Change], signed: bool) -> None:
        outcome, message = case.read(damage, signed)
        assert outcome != "defect", message
        if outcome == "read" and not signed:  # a checksum must have told of any other content
            assert message == whole

    run = given(damage=changes(case.files), signed=st.booleans() if has_checksums(case) else st.just(False))(check)
    run = settings(
        max_examples=cases_of(case.kind), database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], derandomize=False, print_blob=True,
    )(run)  # fmt: skip
    seed(SEED)(run)()


def has_checksums(case: Case) -> bool:
    return any(name.endswith("manifest.json") for name in case.files)
