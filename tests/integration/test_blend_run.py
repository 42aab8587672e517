"""A run on two prepared folders, as commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_module, user_error

from integration.training import learned, overrides

SHORT = ("schedule=constant", "checkpoint.every=2", "validation.every=2")


@pytest.mark.slow
def test_blend(data: Path, books: Path, tmp_path: Path) -> None:
    """Stopped and continued, it learns what it learns in one go; with other weights it is another run."""
    blend = f"{{{data}: 0.75, {books}: 0.25}}"

    def train(run: str, blend: str, *more: str) -> list[str]:
        return overrides(blend, tmp_path / run, *SHORT, *more)

    for run, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        result = run_module("kraken_train.train", *train(run, blend, f"max_steps={steps}"))
        assert result.returncode == 0, result.stderr
        assert f"(0.75 from {data}, 0.25 from {books})" in result.stdout
    assert "resumed from" in result.stdout
    assert learned(tmp_path / "parts") == learned(tmp_path / "whole")
    assert all(learned(tmp_path / "whole")[step][-1] > 0 for step in (1, 3))  # validated
    other = run_module("kraken_train.train", *train("whole", blend.replace("0.75", "0.5"), "max_steps=8"))
    assert "holds a run on other data" in user_error(other)
