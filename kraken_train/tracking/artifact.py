"""An export as an artifact of the run in Weights & Biases that it was made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kraken_train.common.errors import ConfigError
from kraken_train.tracking.backend import only_writer
from kraken_train.tracking.run_info import RunInfo, read_run_info


def read_wandb_run(run_dir: Path) -> RunInfo:
    """The run that artifacts can be added to. Raises ConfigError if there is none, CheckpointError."""
    run_info = read_run_info(run_dir)
    tracking = run_info.tracking
    if tracking.kind != "wandb" or tracking.mode == "off":
        raise ConfigError(
            f"log_artifact=true, but {run_dir} was trained with tracking.kind={tracking.kind} tracking.mode="
            f"{tracking.mode} and so has no run in Weights & Biases; use log_artifact=false"
        )
    return run_info


def log_artifact(run_info: RunInfo, export_dir: Path, metadata: dict[str, Any]) -> None:
    """Add the files of `export_dir`, in the mode of the run. Raises CheckpointError while the run is being followed."""
    import wandb  # noqa: PLC0415 (takes a second, and not everybody uses it)

    from kraken_train.tracking.wandb_backend import start  # noqa: PLC0415

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", run_info.name), type="model", metadata=metadata)
    artifact.add_dir(str(export_dir))
    with only_writer(run_info.path, run_info.tracking.mode, wait=False):
        run, _ = start(run_info, run_info.tracking.mode, lambda text: print(f"note: {text}", flush=True))
        run.log_artifact(artifact, aliases=["latest", f"step-{metadata['step']}"])
        run.finish()
