"""The shipped batch scripts."""

from __future__ import annotations

import subprocess

import pytest
from helpers import REPOSITORY


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate"])
def test_shipped_scripts(name: str) -> None:
    """They are valid bash without being filled in, and have the options that restarts need."""
    path = REPOSITORY / "launch" / "slurm" / f"{name}.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
