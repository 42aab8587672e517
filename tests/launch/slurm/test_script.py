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


def test_each_rank_sees_all_gpus_of_its_node() -> None:
    """Unless the settings say otherwise: NCCL copies directly only between GPUs that a process sees."""
    script = (REPOSITORY / "launch" / "slurm" / "train.sbatch").read_text()
    start = next(line for line in script.splitlines() if "kraken_train.train" in line and "srun " in line)
    assert 0 < start.index(" --gpu-bind=none ") < start.index("srun_options")
