"""Which checkpoints stay on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints.training.manifest import step_of
from checkpoints.training.retention import Retention


def folders(parent: Path, ages: dict[int, int]) -> list[Path]:
    """Of these steps, each changed so many seconds before the time 10000."""
    found = []
    for step, age in ages.items():
        found.append(parent / f"step-{step:08d}")
        found[-1].mkdir()
        os.utime(found[-1], (10000 - age, 10000 - age))
    return found


@pytest.mark.parametrize(
    ("retention", "staying"),
    [
        (Retention(1), [210]),
        (Retention(2), [199, 210]),
        (Retention(9), [20, 90, 103, 110, 199, 210]),
        (Retention(1, milestone=100), [103, 210]),
        (Retention(2, milestone=90), [90, 199, 210]),  # 199 is the first at or after 180
        (Retention(1, milestone=1000), [210]),
        (Retention(1, seconds=50), [110, 199, 210]),
        (Retention(1, milestone=100, seconds=11), [103, 199, 210]),
    ],
)
def test_superfluous(tmp_path: Path, retention: Retention, staying: list[int]) -> None:
    found = folders(tmp_path, {20: 400, 90: 300, 103: 200, 110: 49, 199: 10, 210: 0})
    deleted = retention.superfluous(found, now=10000)
    assert [step_of(folder) for folder in found if folder not in deleted] == staying


def test_one_at_a_time_keeps_the_same(tmp_path: Path) -> None:
    """Milestones stay, whatever comes after them: here the first at or after each hundred."""
    present: list[Path] = []
    for step in range(30, 1000, 30):
        present += folders(tmp_path, {step: 0})
        deleted = Retention(2, milestone=100).superfluous(present, now=10000)
        present = [folder for folder in present if folder not in deleted]
    assert [step_of(folder) for folder in present] == [120, 210, 300, 420, 510, 600, 720, 810, 900, 960, 990]
