"""Exports a run's checkpoint: python -m checkpoints.export run_dir=RUN output_dir=EXPORT

It needs neither GPUs nor the number of ranks that the run had.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.exports.folder import require_unused, write_export
from checkpoints.exports.native import require_native
from checkpoints.training.store import EMA_PREFIX, WEIGHT_PREFIX, read_weights
from data_prep.manifest import TOKENIZER_FOLDER
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.free_text import FilePath, Name
from kraken_train.common.validation import require_at_least, require_choice, require_positive
from kraken_train.model.head_dims import head_size_note
from kraken_train.reporting.model_card import Training, write_card
from kraken_train.run.exports import record_export
from kraken_train.run.folder import read_identity
from kraken_train.tracking.artifact import log_artifact, read_wandb_run
from kraken_train.training.precision import DTYPES

FORMATS = ("kraken", "native")
WEIGHTS = {"last": WEIGHT_PREFIX, "ema": EMA_PREFIX}
EXPORTED_METADATA = ("step", "averaged_steps", "consumed_samples", "tokens", "data_fingerprint")


@dataclass(frozen=True)
class ExportConfig:
    """See conf/export.yaml."""

    run_dir: FilePath  # folder of the training run
    output_dir: FilePath  # folder to create
    step: int | None  # optimizer step of the checkpoint; null: the newest undamaged one
    weights: str  # last | ema: their exponential average, which a run with ema_decay keeps
    average: int  # export the mean of the weights of so many checkpoints, that one and those before it
    # kraken: for this program, and for transformers with trust_remote_code | native: a standard Transformer with
    # RMSNorm, SwiGLU and RoPE as a Llama, or with qk_norm as a Qwen3, for transformers and servers without code of ours
    format: str
    dtype: str  # fp32 | bf16
    license: Name | None  # for the model card, such as apache-2.0; null: none
    log_artifact: bool  # add the export to the run's project in Weights & Biases

    def validate(self) -> None:
        require_choice("format", self.format, FORMATS)
        require_choice("weights", self.weights, tuple(WEIGHTS))
        require_choice("dtype", self.dtype, tuple(DTYPES))
        for name in ("run_dir", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give {name}=FOLDER")
        if self.format == "native" and self.log_artifact:
            raise ConfigError("log_artifact=true logs exports of format=kraken; leave it out with format=native")
        if self.step is not None:
            require_at_least("step", self.step, 0)
        require_positive("average", self.average)


def export(config: ExportConfig) -> None:
    """Write the export. Raises CheckpointError if the run has no such checkpoint or the output cannot be written."""
    run_dir, output_dir = Path(config.run_dir), Path(config.output_dir)
    if not run_dir.is_dir():
        raise CheckpointError(f"run_dir={run_dir} is not a folder; give the run_dir of a training run")
    require_unused(output_dir)
    tracked = read_wandb_run(run_dir) if config.log_artifact else None
    trained = read_weights(run_dir, config.step, config.average, WEIGHTS[config.weights])
    identity = read_identity(run_dir)
    if identity is not None and trained.metadata["run_id"] != identity["id"]:
        raise CheckpointError(
            f"step {trained.metadata['step']} in {run_dir} is a checkpoint of another run; move it away, or give a "
            "step=NUMBER of this run"
        )
    if config.format == "native":
        require_native(trained.model_config)
    for problem in trained.skipped:
        print(f"passed over a damaged checkpoint: {problem}")
    step = trained.metadata["step"]
    training = Training.of_run(run_dir, trained.metadata.get("config", {}), step)
    tokenizer_dir = run_dir / TOKENIZER_FOLDER

    def add_card(folder: Path) -> None:
        if config.format == "kraken":
            write_card(folder, training, config.license, output_dir.resolve().name)

    note = write_export(
        output_dir,
        trained.model_config,
        trained.weights,
        tokenizer_dir=tokenizer_dir if tokenizer_dir.is_dir() else None,
        metadata=exported_metadata(trained.metadata, config.weights),
        dtype=DTYPES[config.dtype],
        native=config.format == "native",
        add_files=add_card,
    )
    parameters = trained.model_config.num_parameters
    if not tokenizer_dir.is_dir():
        print(f"note: {run_dir} has no tokenizer, so the export has none and cannot generate text from a prompt")
    for message in (note, head_size_note(trained.model_config)):
        if message is not None:
            print(f"note: {message}")
    if config.format == "kraken":
        record(run_dir, output_dir, step)
    steps = trained.metadata.get("averaged_steps")
    source = f"step {step}" if steps is None else f"the mean of steps {', '.join(map(str, steps))}"
    source = source if config.weights == "last" else f"the {config.weights} of {source}"
    print(f"exported {source}, {parameters:,} parameters in {config.dtype}, to {output_dir}")
    if tracked is not None:
        log_artifact(tracked, output_dir, {"step": step, "num_parameters": parameters, "dtype": config.dtype})
        print(f"logged as an artifact of run {tracked.run_id} in project {tracked.tracking.project}")


def exported_metadata(metadata: dict[str, Any], weights: str) -> dict[str, Any]:
    exported = {key: metadata[key] for key in EXPORTED_METADATA if key in metadata}
    if len(phases := metadata.get("phases", [])) > 1:  # `data_fingerprint` is that of the first
        exported["phase_data_fingerprints"] = [phase["data_fingerprint"] for phase in phases]
    return exported if weights == "last" else {**exported, "weights": weights}


def record(run_dir: Path, output_dir: Path, step: int) -> None:
    """Let reports on the run find the export."""
    try:
        record_export(run_dir, output_dir, step)
    except OSError as error:
        print(f"note: {run_dir} cannot be written ({error.strerror}), so reports on it will not find this export")


def main() -> None:
    run_entry(export, ExportConfig, "export")


if __name__ == "__main__":
    main()
