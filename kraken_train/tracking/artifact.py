"""An export as an artifact of the run in Weights & Biases that it was made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kraken_train.common.errors import ConfigError
from kraken_train.tracking.backend import only_writer
from kraken_train.tracking.run_info import DescribedRun, read_described_run


def read_wandb_run(run_dir: Path) -> DescribedRun:
    """The run that artifacts can be added to. Raises ConfigError if there is none, CheckpointError."""
    described = read_described_run(run_dir)
    tracking = described.tracking
    if tracking.kind != "wandb" or tracking.mode == "off":
        raise ConfigError(
            f"log_artifact=true, but {run_dir} was trained with tracking.kind={tracking.kind} tracking.mode="
            f"{tracking.mode} and so has no run in Weights & Biases; use log_artifact=false"
        )
    return described


def log_artifact(described: DescribedRun, export_dir: Path, metadata: dict[str, Any]) -> None:
    """Add the files of `export_dir`, in the mode of the run. Raises CheckpointError while the run is being followed."""
    import wandb  # noqa: PLC0415 (takes a second, and not everybody uses it)

    from kraken_train.tracking.wandb_backend import start  # noqa: PLC0415

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", described.name), type="model", metadata=metadata)
    artifact.add_dir(str(export_dir))
    with only_writer(described.path, described.tracking.mode, wait=False):
        run, _ = start(described, described.tracking.mode, lambda text: print(f"note: {text}", flush=True))
        run.log_artifact(artifact, aliases=["latest", f"step-{metadata['step']}"])
        run.finish()
