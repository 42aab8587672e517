"""The index of a checkpoint: which tensors it has, and where in which file the parts of each are.

`torch.distributed.checkpoint` writes it to `.metadata` as a pickle and reads it back with `pickle.load`, which runs
whatever code the file holds. Here the classes that such a pickle names become plain records, any other name is refused,
and the library's own objects are made from the records after they have been checked.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints.training.root_message import root_message
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import read_file

INDEX = ".metadata"  # the file that every folder of torch.distributed.checkpoint has
OF_THE_INDEX = "torch.distributed.checkpoint.metadata"
RECORDS = {
    (OF_THE_INDEX, "BytesStorageMetadata"),
    (OF_THE_INDEX, "ChunkStorageMetadata"),
    (OF_THE_INDEX, "Metadata"),
    (OF_THE_INDEX, "MetadataIndex"),
    (OF_THE_INDEX, "StorageMeta"),
    (OF_THE_INDEX, "TensorProperties"),
    (OF_THE_INDEX, "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}
VALUES = {  # what is made with these names becomes a plain value
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    (OF_THE_INDEX, "_MEM_FORMAT_ENCODING"): int,
}
MEMO_OPERATIONS = ("PUT", "BINPUT", "LONG_BINPUT")  # the unpickler reserves memory up to their number


class RestrictedUnpickler(pickle.Unpickler):
    """Makes a record of each class that an index names. Raises UnpicklingError for any other name.

    The class of the records is made anew for each file, so that what a file does to it ends with it.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

        class Record:
            state: Any = None
            kind: str

            def __new__(cls, *_: Any) -> Record:
                return super().__new__(cls)

            def __setstate__(self, state: Any) -> None:
                self.state = state

        self.classes = {name: type(name[1], (Record,), {"kind": name[1]}) for name in RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.classes:
            return self.classes[module, name]
        if (module, name) in VALUES:
            return VALUES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint has")


def read_index(path: Path, complete: bool = True) -> Metadata:
    """The checkpoint library's index of tensors and files; `complete`: all files are there. Raises CheckpointError."""
    try:
        return parse_index(read_file(path / INDEX), file_sizes(path) if complete else None)
    except OSError as error:
        raise CheckpointError(f"the index of {path} cannot be read: {root_message(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"the index of {path} cannot be used: {error}; it was not loaded") from error


def parse_index(content: bytes, sizes: Mapping[str, int] | None) -> Metadata:
    """The index in `content`, of a checkpoint with files of these `sizes`; None: not all are there yet.

    Raises ValueError with the reason.
    """
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name in MEMO_OPERATIONS and int(argument or 0) > len(content):
                raise ValueError("it is no pickle that was written whole")
        found = RestrictedUnpickler(content).load()
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle raises errors of many kinds
        raise ValueError(f"it is damaged ({error})") from error
    try:
        return checked(found, sizes)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("it does not describe tensors") from error


def checked(found: Any, sizes: Mapping[str, int] | None) -> Metadata:
    """The library's objects from records. Raises ValueError for those that contradict each other or the files."""
    state = state_of(found, "Metadata")
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, entry in state["state_dict_metadata"].items():
        if entry.kind == "BytesStorageMetadata":
            continue  # a pickle of any object, which this program neither writes nor reads
        tensors[text(name)] = tensor_entry(name, state_of(entry, "TensorStorageMetadata"))
    parts = {}
    for key, part in state["storage_data"].items():
        where, info = state_of(key, "MetadataIndex"), state_of(part, "_StorageInfo")
        index = MetadataIndex(text(where["fqn"]), whole_numbers(where["offset"] or ()), where["index"])
        if index.fqn in tensors:
            parts[index] = storage_info(index.fqn, info, sizes)
    for name, tensor in tensors.items():
        if any(MetadataIndex(name, chunk.offsets) not in parts for chunk in tensor.chunks):
            raise ValueError(f"it does not say where all of {name} is")
    needed = sum(math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in tensors.values())
    if sizes is not None and needed > sum(sizes.values()):
        raise ValueError(f"its tensors have {needed} bytes, but the files only {sum(sizes.values())}")
    return Metadata(state_dict_metadata=dict(tensors), storage_data=parts, storage_meta=StorageMeta())


def tensor_entry(name: str, state: Mapping[str, Any]) -> TensorStorageMetadata:
    """The description of a tensor, of whose chunks none lies outside and which have all of its values."""
    size = torch.Size(whole_numbers(state["size"]))
    dtype = state_of(state["properties"], "TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(dtype)
    chunks = []
    for entry in state["chunks"]:
        chunk = state_of(entry, "ChunkStorageMetadata")
        offsets, lengths = whole_numbers(chunk["offsets"]), whole_numbers(chunk["sizes"])
        ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
        if len(ends) != len(size) or any(end > limit for end, limit in zip(ends, size, strict=True)):
            raise ValueError(f"it has a part of {name} that lies outside of {name}")
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths)))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"it lacks a part of {name}")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def storage_info(name: str, state: Mapping[str, Any], sizes: Mapping[str, int] | None) -> _StorageInfo:
    """Where a part of the tensor `name` is. Raises ValueError unless that is in a file of the checkpoint."""
    file = text(state["relative_path"])
    offset, length = whole_numbers((state["offset"], state["length"]))
    if state.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed, which no checkpoint of this program is")
    if sizes is not None and file not in sizes:
        raise ValueError(f"it places {name} in {file}, which is no file of the checkpoint")
    if sizes is not None and offset + length > sizes[file]:
        raise ValueError(f"it places {name} outside of {file}")
    return _StorageInfo(file, offset, length)


def state_of(record: Any, kind: str) -> Any:
    if record.kind != kind:
        raise TypeError(record.kind)
    return record.state


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise TypeError(values)
    return values


class CheckedReader(dcp.FileSystemReader):
    """The library's reader of a checkpoint, with an index that `parse_index` has checked."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file. Raises OSError."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
