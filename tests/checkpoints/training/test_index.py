"""The index of a checkpoint is a pickle: what it names is not run, and what it claims is checked."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import REPOSITORY
from payload import Payload

from checkpoints.training.index import INDEX, parse_index
from checkpoints.training.manifest import MANIFEST, content_sha256
from checkpoints.training.store import read_weights
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256

WRITTEN = REPOSITORY / "tests" / "artefacts" / "written_by_9a2225f" / "run"
STEP = Path("checkpoints") / "step-00000100"
DATA = "__0_0.distcp"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(WRITTEN, tmp_path / "run")
    return tmp_path / "run"


def sign(run: Path) -> None:
    """Make the manifest that of the changed files."""
    manifest = json.loads((run / STEP / MANIFEST).read_text())
    content = manifest["content"]
    for name, entry in content["files"].items():
        file = run / STEP / name
        entry |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (run / STEP / MANIFEST).write_text(json.dumps({"content": content, "sha256": content_sha256(content)}))


def test_the_index_is_that_of_the_library(run: Path) -> None:
    expected = dcp.FileSystemReader(run / STEP).read_metadata()
    found = parse_index((run / STEP / INDEX).read_bytes(), {DATA: (run / STEP / DATA).stat().st_size})
    assert len(found.state_dict_metadata) > 10
    for name, tensor in found.state_dict_metadata.items():
        there: Any = expected.state_dict_metadata[name]
        assert (tensor.size, tensor.chunks) == (there.size, there.chunks)  # type: ignore[union-attr]
        assert tensor.properties.dtype == there.properties.dtype  # type: ignore[union-attr]
    assert {index: vars(info) for index, info in found.storage_data.items()} == {
        index: {**vars(info), "transform_descriptors": None}
        for index, info in expected.storage_data.items()
        if index.fqn in found.state_dict_metadata
    }


def test_code_is_not_run(run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    (run / STEP / INDEX).write_bytes(pickle.dumps(Payload(marker)))
    sign(run)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir.*it was not loaded"):
        read_weights(run)
    assert not marker.exists()


def test_a_pickle_changes_no_class() -> None:
    """BUILD on a class would set its attributes; here it meets one that ends with the file."""
    content = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x08__init__cbuiltins\nlen\ns\x86b."
    with pytest.raises(ValueError, match=r"builtins\.len"):
        parse_index(content, None)
    before = dict(vars(torch.distributed.checkpoint.metadata.Metadata))
    with pytest.raises(ValueError, match="it is damaged"):
        parse_index(content.replace(b"cbuiltins\nlen\n", b"K\x01"), None)
    assert dict(vars(torch.distributed.checkpoint.metadata.Metadata)) == before


def test_a_file_elsewhere(run: Path, tmp_path: Path) -> None:
    """The name in the pickle has the length of the one that it replaces, so that the rest stays as it is."""
    shutil.copy(run / STEP / DATA, run / "ab.distcp")
    for name in (b"../ab.distcp", str(tmp_path).encode()[:12]):
        index = (WRITTEN / STEP / INDEX).read_bytes()
        assert DATA.encode() in index
        (run / STEP / INDEX).write_bytes(index.replace(DATA.encode(), name))
        sign(run)
        with pytest.raises(CheckpointError, match="which is no file of the checkpoint"):
            read_weights(run)


def test_tensors_that_it_claims(run: Path) -> None:
    """A part that lies outside, and more values than the files have bytes."""
    content = (run / STEP / INDEX).read_bytes()
    with pytest.raises(ValueError, match=r"outside of __0_0\.distcp"):
        parse_index(content, {DATA: 1000})
    largest = b"M@\x01"  # 320 rows
    assert content.count(largest) > 2
    with pytest.raises(ValueError, match=r"lacks a part|lies outside"):
        parse_index(content.replace(largest, b"M\xff\xff", 1), None)


def test_no_memory_is_reserved_for_a_number() -> None:
    with pytest.raises(ValueError, match="no pickle"):
        parse_index(b"\x80\x04Nr\xff\xff\xff\x7f.", None)
