"""Perplexity of an export: python -m kraken_train.evaluate export_dir=EXPORT data_dir=DATA

Every token of the split but the first is predicted exactly once, in windows of context_length tokens that follow
one another.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.export_folder import Export, read_export
from data_prep.manifest import SPLITS, Manifest, verify_quick
from kraken_train.cli import run_entry
from kraken_train.data import open_split, sequential
from kraken_train.errors import CheckpointError, ConfigError, DataError
from kraken_train.files import file_sha256
from kraken_train.inference.device import DEVICES, choose_device
from kraken_train.perplexity import evaluate
from kraken_train.rules import require_choice, require_positive


@dataclass(frozen=True)
class EvaluateConfig:
    """See conf/evaluate.yaml."""

    export_dir: str
    data_dir: str
    split: str
    batch_size: int  # windows
    device: str  # auto | cpu | cuda
    output: str | None  # JSON file

    def validate(self) -> None:
        """Raises ConfigError."""
        require_choice("split", self.split, SPLITS)
        require_positive("batch_size", self.batch_size)
        require_choice("device", self.device, DEVICES)
        if self.output is not None and not Path(self.output).parent.is_dir():
            raise ConfigError(f"output={self.output}: the folder {Path(self.output).parent} does not exist")


def require_fitting_data(export: Export, manifest: Manifest, data_dir: Path) -> None:
    """Raises DataError unless the data's token ids mean what the model has learned."""
    if manifest.vocab_size > export.config.vocab_size:
        raise DataError(
            f"{data_dir} has a vocabulary of {manifest.vocab_size} tokens and the export {export.folder} one of "
            f"{export.config.vocab_size}; use data prepared with the export's tokenizer"
        )
    if not export.tokenizer_dir.is_dir():
        return  # the vocabulary's size is all that is known
    for name, sha256 in manifest.tokenizer.files.items():
        path = export.tokenizer_dir / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise DataError(
                f"{data_dir} was prepared with another tokenizer than {export.tokenizer_dir} ({name} differs); "
                "use data prepared with the export's tokenizer"
            )


def main(config: EvaluateConfig) -> None:
    device = choose_device(config.device)
    export, data_dir = read_export(Path(config.export_dir)), Path(config.data_dir)
    manifest = verify_quick(data_dir)
    require_fitting_data(export, manifest, data_dir)
    stream = open_split(data_dir, config.split, manifest)
    windows = sequential(stream, export.config.context_length, config.batch_size)
    # In fp32, whatever the export is stored in: rounding in bf16 would depend on the batch size.
    model = export.load_model(torch.float32, device)
    result = evaluate(model, windows, manifest.splits[config.split].text_bytes)
    if not math.isfinite(result.loss):
        raise CheckpointError("the model's predictions are not finite: its weights are damaged or have diverged")
    print(f"loss           {result.loss:.6f} nats per token")
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"tokens         {result.tokens:,}")
    if result.bits_per_byte is not None:
        print(f"bits per byte  {result.bits_per_byte:.6f}")
    if config.output is not None:
        about = {"export_dir": config.export_dir, "data_dir": config.data_dir, "split": config.split}
        record = {**about, "data_fingerprint": manifest.fingerprint, **dataclasses.asdict(result)}
        write_json(record, Path(config.output))


def write_json(record: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"output={path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run_entry(main, EvaluateConfig, "evaluate", path_keys=("export_dir", "data_dir", "output"))
