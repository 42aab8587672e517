"""The export: a folder with everything that is needed to run a model.

    model.safetensors  weights under global names, sub-layers stacked: layers.3.attention.qkv.weight is (N, 3D, D)
    config.json        the model's settings, `model_type`, `format_version`, `dtype` and facts about the training
    tokenizer/         the tokenizer's files, absent if the model came without one
    SHA256SUMS         hashes of the other files
    modeling_kraken.py, generation_config.json, tokenizer.json, tokenizer_config.json
                       further files for transformers; the last two are made from `tokenizer/`

It is written under a temporary name, `.NAME.tmp`, and renamed when complete. The next attempt empties the temporary
folder of a killed one; a lock keeps two from writing at the same time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.exports.checksums import require_unchanged, write_checksums
from checkpoints.exports.native import is_native, native_description, require_native, to_native
from checkpoints.exports.transformers_tokenizer import write_transformers_tokenizer
from data_prep.manifest import TOKENIZER_FOLDER
from data_prep.tokenizers import Tokenizer, load_tokenizer
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.files import copy_folder, find_escape, kind_of, read_file, real_path, sync_folder
from kraken_train.common.output import sole_writer
from kraken_train.common.parsing import find_wrong_type, parse_json
from kraken_train.common.settings import to_dict
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model

# 1 stored the baselines' attention.qkv.weight as (3, D, D); 3 added the settings of `LayerSettings`, 4
# `ffn_reads_stream`, 5 `embedding_size`.
FORMAT_VERSION = 5
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Entries of config.json that are not settings of the model.
ABOUT_THE_EXPORT = ("architectures", "auto_map", "model_type", "format_version", "dtype", "training")
STORED_DTYPES = ("F32", "BF16", "F16", "F64")  # safetensors' names
MOST_TIMES = 100  # as many parameters as a file has values: then it is not the file of that model
MODELING_FILE = Path(__file__).with_name("modeling_kraken.py")
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Export:
    """An export whose settings and tensor shapes have been checked; weights are read when asked for."""

    folder: Path
    config: ModelConfig
    dtype: torch.dtype  # of the stored weights
    training: dict[str, Any]  # step, tokens and the like; empty if unknown

    @property
    def tokenizer_dir(self) -> Path:
        return self.folder / TOKENIZER_FOLDER

    def require_weights(self) -> None:
        """Raises CheckpointError if the weights are not those that were written. Reads all of the file."""
        require_unchanged(self.folder, WEIGHTS_FILE)

    def load_model(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LanguageModel:
        """The model with its weights in `dtype`, by default the stored one. Raises CheckpointError."""
        self.require_weights()
        weights = read_weights_file(self.folder / WEIGHTS_FILE)
        require_matching_shapes(
            {name: tuple(tensor.shape) for name, tensor in weights.items()}, self.config, str(self.folder)
        )
        model = empty_model(self.config)
        model.load_state_dict(weights, assign=True)
        return model.to(device=device, dtype=dtype or self.dtype).eval()

    def load_tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the export has none, DataError if it is damaged."""
        if not self.tokenizer_dir.is_dir():
            raise CheckpointError(
                f"{self.folder} has no tokenizer, because none was given when it was made; make it again with one"
            )
        require_own_files(self.folder)
        tokenizer = load_tokenizer(self.tokenizer_dir)
        require_unchanged(self.folder, TOKENIZER_FOLDER)
        return tokenizer


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def write_export(
    output_dir: Path,
    model_config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer_dir: Path | None,
    metadata: Mapping[str, Any],
    dtype: torch.dtype,
    native: bool = False,
    add_files: Callable[[Path], None] = lambda folder: None,
) -> str | None:
    """Write an export into `output_dir`, which is new or an empty folder.

    `weights` are those of `build_model(model_config)`; `metadata` is stored as `training`. With `native` the folder is
    that of a Llama or a Qwen3 instead (`exports.native`). `add_files` is called with the folder before it gets its
    name. Returns a note for the user if the tokenizer in transformers is not the same. Raises CheckpointError if the
    folder is in use, weights or tokenizer do not fit the model, or the disk refuses.
    """
    note = None
    require_unused(output_dir)
    output_dir = real_path(output_dir)  # so that it has a name and a parent
    require_matching_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, model_config, "the model")
    if tokenizer_dir is not None:
        require_fitting_tokenizer(tokenizer_dir, model_config)
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    try:
        with sole_writer(temporary, output_dir):
            special_tokens = {}
            if tokenizer_dir is not None:
                tokenizer = load_tokenizer(tokenizer_dir)
                special_tokens = generation_settings(tokenizer, model_config)
                write_json(temporary / GENERATION_FILE, special_tokens)
                note = write_transformers_tokenizer(tokenizer, temporary, model_config.context_length)
                if not native:
                    copy_folder(tokenizer_dir, temporary / TOKENIZER_FOLDER)
            description = describe(model_config, metadata, dtype)
            if native:
                standard = require_native(model_config)
                weights = to_native(standard, weights)
                about = {name: description[name] for name in ("dtype", "training")}
                description = {**native_description(standard, special_tokens), **about}
            else:
                shutil.copyfile(MODELING_FILE, temporary / MODELING_FILE.name)
            write_json(temporary / CONFIG_FILE, description)
            converted = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
            save_file(converted, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            add_files(temporary)
            write_checksums(temporary)
            sync_tree(temporary)
            os.replace(temporary, output_dir)  # over an empty folder too
            sync_folder(output_dir.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"output_dir={output_dir} could not be written: {reason}") from error
    return note


def require_unused(output_dir: Path) -> None:
    """Raises CheckpointError unless `output_dir` is free or an empty folder that can be replaced."""
    if not output_dir.exists():
        if real_path(output_dir).is_symlink():
            raise CheckpointError(f"output_dir={output_dir} is {kind_of(output_dir)}; name another")
        return
    if not output_dir.is_dir() or any(output_dir.iterdir()):
        raise CheckpointError(f"output_dir={output_dir} exists and is not an empty folder; name another or remove it")
    folder = output_dir.resolve()
    if folder == Path.cwd() or folder.is_mount():
        kind = "a mount point" if folder.is_mount() else "the folder that the command runs in"
        raise CheckpointError(f"output_dir={output_dir} is {kind}, which cannot be replaced; name a folder inside it")


def sync_tree(folder: Path) -> None:
    """Flush `folder` and all files and folders below it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # works for a file too


def require_fitting_tokenizer(tokenizer_dir: Path, config: ModelConfig) -> None:
    if not tokenizer_dir.is_dir():
        raise CheckpointError(f"the tokenizer folder {tokenizer_dir} does not exist")
    tokens = load_tokenizer(tokenizer_dir).vocab_size
    if tokens > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {tokenizer_dir} has {tokens} tokens, but the model's vocabulary only "
            f"{config.vocab_size}; it belongs to another model"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def generation_settings(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """The settings of `generate` in transformers: the token that ends text, and embedding rows that are no tokens.

    Without a prompt it begins a document, behind the end of another, as in training.
    """
    end = tokenizer.end_of_document
    padding = list(range(tokenizer.vocab_size, config.vocab_size))
    return {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        **({"suppress_tokens": padding} if padding else {}),
    }


def describe(config: ModelConfig, metadata: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`."""
    module = MODELING_FILE.stem
    return {
        "architectures": ["KrakenForCausalLM"],  # the class in transformers, for all architectures
        "auto_map": {
            "AutoConfig": f"{module}.KrakenConfig",
            "AutoModel": f"{module}.KrakenModel",
            "AutoModelForCausalLM": f"{module}.KrakenForCausalLM",
        },
        "model_type": "kraken",
        "format_version": FORMAT_VERSION,
        "dtype": next(name for name, known in DTYPES.items() if known == dtype),
        **to_dict(config),
        "training": dict(metadata),
    }


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


def read_export(export_dir: Path) -> Export:
    """The export in `export_dir`. Raises CheckpointError if it is missing, damaged, or from a newer program."""
    if not export_dir.is_dir():
        raise CheckpointError(f"export_dir={export_dir} is not a folder; name one that checkpoints.export has written")
    require_own_files(export_dir)
    description = read_description(export_dir / CONFIG_FILE)
    if "transformers_version" in description:
        raise CheckpointError(
            f"{export_dir} was saved by transformers; make an export of it with "
            f"python -m checkpoints.import_transformers model_dir={export_dir} output_dir=EXPORT"
        )
    settings = {key: value for key, value in description.items() if key not in ABOUT_THE_EXPORT}
    try:
        config = parse_model(settings)
    except ConfigError as error:
        raise CheckpointError(f"{export_dir / CONFIG_FILE} does not describe a model: {error}") from error
    if description["format_version"] < config.first_export_format:
        raise CheckpointError(
            f"{export_dir / CONFIG_FILE} has format_version=1, of a program from before grouped-query attention, which "
            f"kept queries, keys and values of a {config.architecture} Transformer in another order; use that version"
        )
    weights = export_dir / WEIGHTS_FILE
    require_matching_shapes(read_shapes(weights), config, str(weights))
    dtype = DTYPES.get(str(description.get("dtype", "")))
    if dtype is None:
        raise CheckpointError(
            f"{export_dir / CONFIG_FILE} has dtype={description.get('dtype')}; known: {', '.join(DTYPES)}"
        )
    training = training_of(description, export_dir / CONFIG_FILE)
    require_unchanged(export_dir, CONFIG_FILE)
    return Export(export_dir, config, dtype, training)


def training_of(description: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What `path`, a config.json, says about the training; empty if nothing. Raises CheckpointError."""
    training = description.get("training") or {}
    if not isinstance(training, dict) or (wrong := find_wrong_type(training, {"step": int, "tokens": int})):
        what = f"training.{wrong}" if isinstance(training, dict) else "training"
        raise CheckpointError(f"{path} is damaged: its {what} is of the wrong type; copy it again or export again")
    return training


def require_own_files(folder: Path) -> None:
    """Raises CheckpointError if a file or folder in it is a link that leads out of it."""
    for path in folder.rglob("*"):
        if path.is_symlink() and (escape := find_escape(folder, path)) is not None:
            raise CheckpointError(
                f"{escape}; a model's folder holds its own files, so copy the file in place of the link"
            )


def read_description(path: Path) -> dict[str, Any]:
    """The config.json of an export. Raises CheckpointError."""
    description = read_json(path)
    require_ours(description, path)
    return description


def read_json(path: Path) -> dict[str, Any]:
    """A config.json of any model. Raises CheckpointError."""
    try:
        description = parse_json(read_file(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, so {path.parent} is not an export") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again or export again") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} is not of an export: its model_type is not kraken")
    return description


def require_ours(description: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError unless it describes a model of this program, and of no later version."""
    if is_native(description):
        raise CheckpointError(
            f"{path} describes a {description['model_type']} of transformers; make an export of it with "
            f"python -m checkpoints.import_transformers model_dir={path.parent} output_dir=EXPORT"
        )
    if description.get("model_type") != "kraken":
        raise CheckpointError(f"{path} is not of an export: its model_type is not kraken")
    version = description.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version={version}, and this program knows up to {FORMAT_VERSION}; "
            "update the program or export again with this one"
        )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes from the file's header. Raises CheckpointError, also for a truncated file."""
    with safetensors_errors(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        for name, part in slices.items():
            if part.get_dtype() not in STORED_DTYPES:
                raise CheckpointError(
                    f"{path} has {name} as {part.get_dtype()}, but weights are {', '.join(STORED_DTYPES)}; save the "
                    "model in one of these"
                )
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, which must be weights. Raises CheckpointError."""
    read_shapes(path)
    with safetensors_errors(path):
        return load_file(path)


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """What may go wrong while a safetensors file is read becomes a CheckpointError."""
    found = kind_of(path)
    if found is None:
        raise CheckpointError(f"{path} is missing; copy it again or save the model again")
    if found != "a file":  # which would be waited for
        raise CheckpointError(f"{path} is {found}, not a file; copy it again or save the model again")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); copy it again or save the model again"
        ) from error


def require_matching_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Raises CheckpointError unless `found` are the tensors of the model, each with its shape."""
    values = sum(math.prod(shape) for shape in found.values())
    if config.num_parameters > MOST_TIMES * values:  # the comparison below takes time for each layer
        raise CheckpointError(
            f"{where} has {values:,} values, but its settings describe {config.num_parameters:,} parameters"
        )
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    problems = [f"lacks the weight {name}" for name in expected if name not in found]
    problems += [f"has an unexpected weight {name}" for name in found if name not in expected]
    problems += [
        f"has {name} of shape {found[name]}, but its settings say {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" ({len(problems) - 1} more such differences)" if len(problems) > 1 else ""
        raise CheckpointError(f"{where} {problems[0]}{more}")


def empty_model(config: ModelConfig) -> LanguageModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return build_model(config)
