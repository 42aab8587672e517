"""Imports a checkpoint of the authors' code as an export:

    python -m checkpoints.import_reference checkpoint=ckpt.pt output_dir=EXPORT

Their `ckpt.pt` is a pickle. PyTorch's restricted loader reads it, which accepts only tensors and plain values and runs
no code from the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.exports.folder import require_unused, write_export
from checkpoints.exports.reference import convert_reference_state_dict
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import require_regular
from kraken_train.common.free_text import FilePath
from kraken_train.common.validation import require_positive
from kraken_train.model.config import KrakenConfig
from kraken_train.model.head_dims import head_size_note

# Their name of a dimension -> our name; only dimensions that the shapes of the weights also show.
DIMENSIONS_IN_SHAPES = {
    "n_layer": "num_layers",
    "n_embd": "hidden_size",
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "ffn_expansion": "ffn_multiplier",
}


DIMENSIONS_OF_WEIGHTS = {  # those that tell the model's sizes
    "conjunction.weight": 3,
    "token_embedding.weight": 2,
    "position_embedding.weight": 2,
    "layers.0.ffn.up.weight": 3,
}


@dataclass(frozen=True)
class ImportConfig:
    """See conf/import_reference.yaml."""

    checkpoint: FilePath  # the authors' ckpt.pt
    output_dir: FilePath  # folder to create
    tokenizer_dir: FilePath | None  # folder `tokenizer` of prepared data, to copy into the export; null: none
    heads_per_sub_layer: int | None  # only if the checkpoint does not contain it; null: as in the checkpoint

    def validate(self) -> None:
        if self.heads_per_sub_layer is not None:
            require_positive("heads_per_sub_layer", self.heads_per_sub_layer)


def import_reference(config: ImportConfig) -> None:
    """Write the export. Raises CheckpointError if the file is not of the authors' code or the output not writable."""
    output_dir = Path(config.output_dir)
    require_unused(output_dir)
    stored = read_checkpoint(Path(config.checkpoint))
    weights = convert_reference_state_dict(stored["model"])
    model_config = infer_config(weights, stored["model_args"], config.heads_per_sub_layer)
    metadata = {"step": stored["iter_num"]} if isinstance(stored.get("iter_num"), int) else {}
    tokenizer_dir = Path(config.tokenizer_dir) if config.tokenizer_dir else None
    note = write_export(
        output_dir, model_config, weights, tokenizer_dir=tokenizer_dir, metadata=metadata, dtype=torch.float32
    )
    for message in (note, head_size_note(model_config)):
        if message is not None:
            print(f"note: {message}")
    print(f"imported {model_config.num_parameters:,} parameters to {output_dir}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dictionary with `model` (names to tensors) and `model_args`. Raises CheckpointError."""
    require_regular(path, "checkpoint", CheckpointError)
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint={path} holds objects other than tensors and plain values, which could run code; it was not "
            "loaded"
        ) from error
    except Exception as error:  # of any kind: the library unpickles step by step, and checks none of what it takes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint={path} is not a checkpoint written by torch.save ({reason})") from error
    if not isinstance(stored, dict) or not is_state_dict(stored.get("model")):
        raise CheckpointError(f"checkpoint={path} has no weights under `model`, so it is not of the authors' code")
    arguments = stored.get("model_args")
    return {**stored, "model_args": arguments if isinstance(arguments, dict) else {}}


def is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def infer_config(
    weights: Mapping[str, Tensor], arguments: Mapping[str, Any], heads_per_sub_layer: int | None = None
) -> KrakenConfig:
    """The configuration from the shapes of converted weights.

    The number of heads is not visible in a shape: it is `heads_per_sub_layer` if given, or else that of `arguments`.
    Raises CheckpointError if `arguments` contradict the weights.
    """
    for name, dimensions in DIMENSIONS_OF_WEIGHTS.items():
        if name not in weights or weights[name].dim() != dimensions:
            raise CheckpointError(f"the checkpoint has no weight that could be our {name}, of {dimensions} dimensions")
    num_sub_layers, hidden_size, _ = weights["conjunction.weight"].shape
    heads = heads_per_sub_layer or arguments.get("n_heads_in_split")
    if not isinstance(heads, int):
        raise CheckpointError(
            "the checkpoint does not contain the number of heads of a sub-layer (model_args.n_heads_in_split), and the "
            "weights do not show it; give heads_per_sub_layer=NUMBER"
        )
    config = KrakenConfig(
        num_sub_layers=num_sub_layers,
        num_layers=sum(name.endswith(".attention.qkv.weight") for name in weights),
        hidden_size=hidden_size,
        heads_per_sub_layer=heads,
        vocab_size=weights["token_embedding.weight"].shape[0],
        context_length=weights["position_embedding.weight"].shape[0],
        ffn_multiplier=weights["layers.0.ffn.up.weight"].shape[1] // hidden_size,
    )
    for theirs, ours in DIMENSIONS_IN_SHAPES.items():
        argument, actual = arguments.get(theirs), getattr(config, ours)
        if argument is not None and argument != actual:
            raise CheckpointError(
                f"model_args.{theirs}={argument} contradicts the checkpoint's weights, which have {actual}"
            )
    total = arguments.get("n_head")  # their n_head counts the heads of all sub-layers
    if heads_per_sub_layer is None and total is not None and total != num_sub_layers * heads:
        raise CheckpointError(
            f"model_args.n_head={total} contradicts {num_sub_layers} sub-layers with n_heads_in_split={heads} each; "
            "give heads_per_sub_layer=NUMBER"
        )
    return config


def main() -> None:
    run_entry(import_reference, ImportConfig, "import_reference")


if __name__ == "__main__":
    main()
