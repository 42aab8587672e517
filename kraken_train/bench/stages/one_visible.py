"""Training where each rank sees one GPU, its own, as under `srun --gpus-per-task=1`."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from types import ModuleType

from kraken_train.bench.stages.preset import RunRequest
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.stages.training_runs import new_run
from kraken_train.parallel.ranks import free_port


def measure(request: RunRequest, calls: ModuleType) -> Measured:
    run = new_run(replace(request, ranks=1), "one-visible")  # the launcher is this program
    common = {
        "WORLD_SIZE": str(request.ranks), "LOCAL_WORLD_SIZE": str(request.ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = (list(map(str, range(request.ranks))) if visible is None else visible.split(",")) or [""]
    processes = [
        subprocess.Popen(
            run.command(request.sizes.steps),
            env=os.environ
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": shown[rank % len(shown)]},
        )
        for rank in range(request.ranks)
    ]
    codes = [process.wait() for process in processes]
    figures = {
        "all ranks succeed": not any(codes),
        "steps taken": max(run.losses(), default=0) if (run.folder / "metrics.jsonl").exists() else 0,
    }
    return Measured(figures, {"exit codes": codes})
