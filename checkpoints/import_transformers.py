"""Imports a model that transformers has saved, as an export; one that came from an export, a Llama or a Qwen3:

    python -m checkpoints.import_transformers model_dir=FOLDER output_dir=EXPORT

Training can then start from it (`init_from=EXPORT` of kraken_train.train). Only safetensors files are read, no pickles,
and no code of the folder is run.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.exports.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_json,
    read_weights_file,
    require_ours,
    require_own_files,
    require_unused,
    training_of,
    write_export,
)
from checkpoints.exports.native import from_native, is_native, native_config
from data_prep.manifest import TOKENIZER_FOLDER
from data_prep.tokenizers import HuggingFaceTokenizer
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.files import is_plain_name, read_file
from kraken_train.common.free_text import FilePath
from kraken_train.common.parsing import parse_json
from kraken_train.common.validation import require_choice
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.model.head_dims import head_size_note
from kraken_train.model.registry import ARCHITECTURES
from kraken_train.training.precision import DTYPES

INDEX_FILE = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "token_embedding.weight"


@dataclass(frozen=True)
class ImportConfig:
    """See conf/import_transformers.yaml."""

    # folder that save_pretrained has written, of a model that was loaded from an export, or of a Llama or a Qwen3
    model_dir: FilePath
    output_dir: FilePath  # folder to create
    # folder `tokenizer` of prepared data, to copy into the export; null: that of model_dir
    tokenizer_dir: FilePath | None
    dtype: str  # fp32 | bf16

    def validate(self) -> None:
        require_choice("dtype", self.dtype, tuple(DTYPES))
        for name in ("model_dir", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give {name}=FOLDER")


def import_transformers(config: ImportConfig) -> None:
    """Write the export. Raises CheckpointError if the model is not one of ours or the output cannot be written."""
    model_dir, output_dir = Path(config.model_dir), Path(config.output_dir)
    require_unused(output_dir)
    if not model_dir.is_dir():
        raise CheckpointError(f"model_dir={model_dir} is not a folder; give one that save_pretrained has written")
    require_own_files(model_dir)
    path = model_dir / CONFIG_FILE
    description = read_json(path)
    if is_native(description):
        model_config: ModelConfig = (native := native_config(description, path))
        weights = from_native(native, read_tensors(model_dir), model_dir)
    else:
        require_ours(description, path)
        model_config = read_model_config(description, path)
        weights = without_tied_head(read_tensors(model_dir), model_config, model_dir)
    with ExitStack() as stack:
        tokenizer_dir = find_tokenizer(config.tokenizer_dir, model_dir, stack)
        note = write_export(
            output_dir,
            model_config,
            weights,
            tokenizer_dir=tokenizer_dir,
            metadata=training_of(description, path),
            dtype=DTYPES[config.dtype],
        )
    if tokenizer_dir is None:
        print(f"note: {model_dir} has no tokenizer, so the export has none; tokenizer_dir=FOLDER adds one")
    for message in (note, head_size_note(model_config)):
        if message is not None:
            print(f"note: {message}")
    print(f"imported {model_config.num_parameters:,} parameters in {config.dtype} to {output_dir}")


def read_model_config(description: dict[str, Any], path: Path) -> ModelConfig:
    """The model's settings in a config.json, which also holds settings of transformers. Raises CheckpointError."""
    architecture = description.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path} has architecture={architecture}; known: {', '.join(ARCHITECTURES)}")
    schema = ARCHITECTURES[architecture]
    settings = {name: value for name, value in description.items() if name in schema.setting_names()}
    # The library has a name of its own for what is tied, and saves the head dimension that our `null` stands for.
    settings["tie_embeddings"] = description.get("tie_word_embeddings", settings.get("tie_embeddings", True))
    try:
        config = parse_model(settings)
        plain = config.replace(head_dim=None) if config.hidden_size % config.heads == 0 else config
        return plain if plain.head_size == config.head_size else config
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a model: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of the folder. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= read_weights_file(path)
    return weights


def without_tied_head(weights: dict[str, Tensor], config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """The weights without a head that is tied to the embedding. Raises CheckpointError where it is another matrix."""
    if not config.tie_embeddings:
        return weights
    head = weights.pop(HEAD, None)
    if head is not None and EMBEDDING in weights and not torch.equal(head, weights[EMBEDDING]):
        raise CheckpointError(
            f"{HEAD} and {EMBEDDING} in {folder} differ, but {CONFIG_FILE} has tie_word_embeddings=true; save it with "
            "tie_word_embeddings=false"
        )
    if head is not None:
        weights.setdefault(EMBEDDING, head)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder; a large model has several. Raises CheckpointError."""
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).exists() or not index.exists():
        return [require_weights(folder)]
    try:
        names = parse_json(read_file(index))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r}); copy it again or save the model again") from error
    for name in files:
        if not is_plain_name(name):
            raise CheckpointError(f"{index} names {name}, which is not a file in the same folder; save the model again")
    return [folder / name for name in files]


def require_weights(folder: Path) -> Path:
    if any(folder.glob("adapter_model.*")):
        raise CheckpointError(
            f"{folder} holds an adapter, not a model; merge it (merge_and_unload of peft) and save the model"
        )
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} holds a pickle, which is not read; save the model with safe_serialization=True"
        )
    return folder / WEIGHTS_FILE


def find_tokenizer(setting: str | None, model_dir: Path, stack: ExitStack) -> Path | None:
    """The folder of the tokenizer in our format; None if there is no tokenizer.

    It is `setting`, or that of the model, or a temporary one made from the model's tokenizer.json, which exists until
    `stack` is closed. Raises CheckpointError if that cannot be written.
    """
    if setting is not None:
        return Path(setting)
    if (model_dir / TOKENIZER_FOLDER).is_dir():
        return model_dir / TOKENIZER_FOLDER
    if not (model_dir / HuggingFaceTokenizer.FILE).is_file():
        return None
    tokenizer = HuggingFaceTokenizer.from_path(model_dir, None)
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tokenizer.save(folder)
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer cannot be written to a temporary folder ({error}); free some space, or set TMPDIR to "
            "another folder"
        ) from error
    return folder


def main() -> None:
    run_entry(import_transformers, ImportConfig, "import_transformers")


if __name__ == "__main__":
    main()
