"""A pipe where a file is expected is named and never waited for; a link to nothing is named as one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints.exports.folder import read_export, require_unused
from checkpoints.exports.initial import open_initial_export
from checkpoints.import_reference import read_checkpoint
from checkpoints.import_transformers import ImportConfig, import_transformers
from checkpoints.inspect import inspect
from data_prep.foreign import find_megatron, find_nanogpt
from data_prep.manifest import verify_quick
from data_prep.sources import SourceSettings, open_source
from data_prep.tokenizers import TokenizerSettings, build_tokenizer
from kraken_train.common.cli import compose_command
from kraken_train.common.errors import CheckpointError, DataError, KrakenError
from kraken_train.generate import GenerateConfig, read_prompts
from kraken_train.model.config import KrakenConfig
from kraken_train.run.metrics import read_run
from kraken_train.run.state import read_state
from kraken_train.training.teacher import read_teacher
from launch.demo import make_folder
from launch.hosts import read_hostfile

pytestmark = pytest.mark.timeout(60)
MODEL = KrakenConfig(
    num_sub_layers=2, num_layers=1, hidden_size=8, heads_per_sub_layer=1, vocab_size=64, context_length=8
)


def prompts(path: Path) -> object:
    return read_prompts(compose_command([f"prompts_file={path}", "export_dir=e"], GenerateConfig, "generate"))


def tokenizer(kind: str) -> Callable[[Path], object]:
    return lambda path: build_tokenizer(TokenizerSettings(kind=kind, path=str(path)), lambda: iter(()))


READERS: dict[str, Callable[[Path], object]] = {
    "source": lambda path: open_source(SourceSettings(str(path))),
    "tokenizer.path of sentencepiece": tokenizer("sentencepiece_model"),
    "tokenizer.path of huggingface": tokenizer("huggingface"),
    "source of nanogpt": find_nanogpt,
    "source of megatron": find_megatron,
    "data_dir": verify_quick,
    "export_dir": read_export,
    "distill.teacher": lambda path: read_teacher(f"distill.teacher={path}", path, MODEL),
    "init_from": lambda path: open_initial_export(path, MODEL, {}),
    "model_dir": lambda path: import_transformers(ImportConfig(str(path), str(path.parent / "e"), None, "fp32")),
    "checkpoint": read_checkpoint,
    "checkpoint to inspect": inspect,
    "run to report": read_run,
    "run of status": read_state,
    "prompts_file": prompts,
    "--hostfile": read_hostfile,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["pipe", "dangling", "circle"])
def test_one_message_names_it(reader: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "named.bin"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling" else "named.bin")
    with pytest.raises(KrakenError, match="named"):
        reader(path)


def test_an_export_into_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e").symlink_to("e")
    with pytest.raises(CheckpointError, match=r"output_dir=.*/e is a link to e, which leads around in a circle"):
        require_unused(tmp_path / "e")


def test_a_foreign_split_that_is_linked_to_nothing_is_not_left_out(tmp_path: Path) -> None:
    np.arange(10, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "val.bin").symlink_to("/nowhere/val.bin")
    with pytest.raises(DataError, match=r"val.bin is a link to /nowhere/val.bin, which does not exist"):
        find_nanogpt(tmp_path)


def test_a_foreign_shard_without_an_index_is_not_left_out(tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx", "b.bin"):
        (tmp_path / name).write_bytes(b"0")
    with pytest.raises(DataError, match=r"b.bin has no index b.idx, .*1 such in source=.*; copy the index"):
        find_megatron(tmp_path)


def test_a_demo_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        SystemExit, match=f"error: {tmp_path}/file/demo cannot be written: Not a directory; name another"
    ):
        make_folder(tmp_path / "file" / "demo")
