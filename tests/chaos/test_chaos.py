"""Five cheap faults in the default suite, and tests of the harness itself. `make chaos` runs many on real processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chaos.__main__ import draw_cases
from chaos.attempt import Attempt, ForkedStart
from chaos.faults import FINISHED, KILLED, MESSAGE, SAVED
from chaos.harness import FAULTS, Harness, Result, judge
from chaos.report import describe, table
from chaos.victims import STEPS, VICTIMS

# Of one process, in a training or a preparation. Of each the seed decides the command and the moment.
CHEAP = [("kill-process", 7), ("nan-gradient", 1), ("flipped-file", 6), ("fsync-fails", 1), ("duplicate", 1)]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("chaos"), ForkedStart)


@pytest.mark.parametrize(("kind", "seed"), CHEAP)
def test_a_cheap_fault(harness: Harness, kind: str, seed: int) -> None:
    result = harness.run_case(kind, seed)
    assert not result.problems, describe(result)


@pytest.fixture
def runs(harness: Harness, tmp_path: Path) -> tuple[Path, Path]:
    """The undisturbed training, and a copy of it."""
    undisturbed = harness.undisturbed.of(VICTIMS["train"])
    shutil.copytree(undisturbed, tmp_path / "work")
    return tmp_path / "work", undisturbed


def test_what_a_training_must_not_differ_in(runs: tuple[Path, Path]) -> None:
    work, undisturbed = runs
    compare = VICTIMS["train"].compare
    assert compare(work, undisturbed) == []
    newest = work / "run" / "checkpoints" / f"step-{STEPS:08d}"
    weights = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (problem, *_) = compare(work, undisturbed)
    assert "a damaged checkpoint is left" in problem

    metrics = work / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[7]["loss"] += 1e-6
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    (problem,) = compare(work, undisturbed)
    assert "other losses" in problem
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records[:-1]))
    assert compare(work, undisturbed) != []


@pytest.mark.parametrize(
    ("attempt", "end", "wrong"),
    [
        (Attempt(0, "step 1\n"), FINISHED, None),
        (Attempt(0, "error: a disk\n"), FINISHED, "error messages"),
        (Attempt(143, "stopped\n"), SAVED, None),
        (Attempt(-9, ""), KILLED, None),
        (Attempt(2, "error: one\nerror: one\nerror: another rank has ended, see its message\n"), MESSAGE, None),
        (Attempt(2, ""), MESSAGE, "0 error messages"),
        (Attempt(1, "error: one\nerror: two\n"), MESSAGE, "2 error messages"),
        (Attempt(1, "Traceback (most recent call last):\nerror: one\n"), MESSAGE, "traceback"),
        (Attempt(1, "error: one\n", ("process 7",)), MESSAGE, "left over: process 7"),
    ],
)
def test_how_an_end_is_judged(attempt: Attempt, end: str, wrong: str | None) -> None:
    found, problems = judge(attempt)
    assert found == end
    assert problems == [] if wrong is None else wrong in problems[0]


def test_cases_follow_from_the_seed() -> None:
    kinds = sorted(FAULTS)
    cases = draw_cases(kinds, 2 * len(kinds), seed=3)
    assert cases == draw_cases(kinds, 2 * len(kinds), seed=3)
    assert cases != draw_cases(kinds, 2 * len(kinds), seed=4)
    assert sorted(kind for kind, _ in cases[: len(kinds)]) == kinds, "not each kind once before any comes again"


def test_the_table() -> None:
    results = [
        Result("kill-rank", 5, "train-P2", MESSAGE, [], []),
        Result("kill-rank", 6, "train-P2", MESSAGE, ["it ended"], ["left over: process 7"]),
    ]
    lines = table(results, {"slurm": "no controller answers"}).splitlines()
    assert lines[1].split() == ["kill-rank", "2", "1", "1"]
    assert lines[-1] == "slurm  not possible here: no controller answers"
    assert "PROBLEM: left over: process 7" in describe(results[1])
    assert "make chaos KIND=kill-rank CASE=6" in describe(results[1])


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("kind", ["kill-rank", "kill-node", "end-launcher", "missing-file", "full-disk", "network-cut"])
def test_real_processes(tmp_path: Path, kind: str) -> None:
    if (reason := FAULTS[kind].impossible()) is not None:
        pytest.skip(reason)
    result = Harness(tmp_path).run_case(kind, 1)
    assert not result.problems, describe(result)
