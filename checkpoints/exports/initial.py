"""An export as the start of a training run: checks that it is the run's model, and reads each rank's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.exports.folder import WEIGHTS_FILE, Export, read_export
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256
from kraken_train.common.settings import to_dict
from kraken_train.model.config import ModelConfig
from kraken_train.parallel.sharding import ShardedDim

DESCRIPTION = "kraken_tokenizer.json"  # also has the source of the tokenizer, which may differ


def open_initial_export(folder: Path, config: ModelConfig, tokenizer_files: Mapping[str, str]) -> Export:
    """The export in `folder`.

    Raises CheckpointError if there is none, if it is of another model than `config`, and if its tokenizer is not that
    of the run's data, which has `tokenizer_files` (name -> SHA-256).
    """
    if not folder.is_dir():
        raise CheckpointError(f"init_from={folder} is not a folder; name an export")
    export = read_export(folder)
    there, here = to_dict(export.config), to_dict(config)
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"init_from={folder} is an export of another model: model.{name} is {there.get(name)} there and "
                f"{here.get(name)} here; use the same model settings"
            )
    require_same_tokenizer(f"init_from={folder}", export, tokenizer_files)
    return export


def require_same_tokenizer(setting: str, export: Export, tokenizer_files: Mapping[str, str]) -> None:
    """Raises CheckpointError if the export that `setting` names has another tokenizer than these files.

    An export without a tokenizer passes: its maker gave none.
    """
    for name, sha256 in tokenizer_files.items():
        path = export.tokenizer_dir / name
        if (
            export.tokenizer_dir.is_dir()
            and name != DESCRIPTION
            and not (path.is_file() and file_sha256(path) == sha256)
        ):
            raise CheckpointError(
                f"{setting} was trained with another tokenizer than the data were prepared with ({name} differs); "
                "prepare the data with the export's"
            )


@contextmanager
def export_reader(export: Export) -> Iterator[Callable[[str, ShardedDim | None], Tensor]]:
    """A function that reads the part of a weight, by name, that `sharded_dim` says; None: all of it.

    Raises CheckpointError where the file cannot be read.
    """
    path = export.folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:

            def read(name: str, sharded_dim: ShardedDim | None) -> Tensor:
                if sharded_dim is None:
                    return cast(Tensor, file.get_tensor(name))
                return sharded_dim.read(file.get_slice(name))

            yield read
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again or export again") from error
