"""The shipped batch scripts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import REPOSITORY


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate"])
def test_shipped_scripts(name: str) -> None:
    """They are valid bash without being filled in, and have the options that restarts need."""
    path = REPOSITORY / "launch" / "slurm" / f"{name}.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)


@pytest.mark.parametrize("gpus", ["8", None])
def test_each_rank_sees_all_gpus_of_its_node(tmp_path: Path, gpus: str | None) -> None:
    """Where the job has some, unless the settings say otherwise: a copy between GPUs needs a process that sees both."""
    script = (REPOSITORY / "launch" / "slurm" / "train.sbatch").read_text()
    settings = {"source .venv/bin/activate": ":", "python=(python -m)": "python=(true)"}
    for line, replaced in {**settings, "srun_options=()": "srun_options=(--own)"}.items():
        assert line in script
        script = script.replace(line, replaced)
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"$(dirname "$0")/calls"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    if gpus is not None:
        environment["SLURM_GPUS_ON_NODE"] = gpus
    subprocess.run(["bash", "-c", script, "train.sbatch", "run_dir=RUN"], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    bind = "" if gpus is None else "--gpu-bind=none "
    assert f"srun --kill-on-bad-exit=1 {bind}--own true kraken_train.train run_dir=RUN" in calls
