"""Parsing of Slurm's times and generic resources."""

from __future__ import annotations

import pytest

from launch.slurm import scheduler


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:30", 330), ("1:02:03", 3723), ("2-12", 216000), ("1-1:30", 91800), ("1-0:0:5", 86405)],
)
def test_seconds(time: str, seconds: int) -> None:
    assert scheduler.seconds(time) == seconds


def test_parse_gpus() -> None:
    gres = {"(null)": 0, "gpu:4": 4, "gpu:a100:8(S:0-1)": 8, "nvme:1,gpu:h100:2(S:0),gpu:a100:2(S:1)": 4}
    assert {text: scheduler.parse_gpus(text) for text in gres} == gres
