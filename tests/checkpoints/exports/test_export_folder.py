"""Exports: written and read again, and one message for each kind of damage."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import random_ids, rough_model, small_configs, write_small_export
from safetensors.torch import load_file, save_file

from checkpoints.exports.checksums import SUMS_FILE
from checkpoints.exports.folder import read_export, write_export
from kraken_train.common.errors import CheckpointError
from kraken_train.common.output import sole_writer
from kraken_train.model.config import ModelConfig

CONFIGS = small_configs(vocab_size=320)
METADATA = {"step": 12, "tokens": 3456, "data_fingerprint": "abc"}


@pytest.fixture
def export_dir(tmp_path: Path) -> Path:
    config = CONFIGS["kraken"]
    write_export(
        tmp_path / "e",
        config,
        rough_model(config).state_dict(),
        tokenizer_dir=None,
        metadata=METADATA,
        dtype=torch.float32,
    )
    return tmp_path / "e"


def edit_config(export_dir: Path, **changes: object) -> None:
    path = export_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (export_dir / SUMS_FILE).unlink()


@pytest.mark.parametrize("architecture", small_configs())
def test_round_trip(architecture: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    config = CONFIGS[architecture]
    model = rough_model(config, torch.float32)
    write_export(
        tmp_path / "a" / "e",
        config,
        model.state_dict(),
        tokenizer_dir=tokenizer_dir,
        metadata=METADATA,
        dtype=torch.float32,
    )
    export = read_export(tmp_path / "a" / "e")
    assert export.config == config
    assert export.training == METADATA
    ids = random_ids(config, 2, 8)
    assert torch.equal(export.load_model()(ids), model(ids))
    assert export.load_model(torch.float64).token_embedding.weight.dtype == torch.float64
    tokenizer = export.load_tokenizer()
    assert tokenizer.decode(tokenizer.encode_batch(["the river"])[0]) == "the river"
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["e"]


def test_format(export_dir: Path) -> None:
    description = json.loads((export_dir / "config.json").read_text())
    assert description["model_type"] == "kraken"
    assert description["format_version"] == 5
    assert description["architectures"] == ["KrakenForCausalLM"]
    assert description["dtype"] == "float32"
    assert description["num_sub_layers"] == 3
    assert description["training"] == METADATA
    weights = load_file(export_dir / "model.safetensors")
    assert weights["layers.1.attention.qkv.weight"].shape == (3, 48, 16)
    assert not any("head" in name for name in weights)  # tied with the embedding


def test_bf16(tmp_path: Path) -> None:
    config = CONFIGS["kraken"]
    weights = rough_model(config, torch.float32).state_dict()
    write_export(tmp_path / "e", config, weights, tokenizer_dir=None, metadata={}, dtype=torch.bfloat16)
    loaded = read_export(tmp_path / "e").load_model().state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in weights.items())


def test_an_empty_folder_is_filled_and_a_used_one_refused(tmp_path: Path) -> None:
    config, weights = CONFIGS["kraken"], rough_model(CONFIGS["kraken"]).state_dict()
    (tmp_path / "e").mkdir()
    write_export(tmp_path / "e", config, weights, tokenizer_dir=None, metadata={}, dtype=torch.float32)
    before = (tmp_path / "e" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        write_export(tmp_path / "e", config, weights, tokenizer_dir=None, metadata=METADATA, dtype=torch.float32)
    assert (tmp_path / "e" / "config.json").read_bytes() == before


def write_into(output_dir: Path) -> None:
    config = CONFIGS["kraken"]
    weights = rough_model(config).state_dict()
    write_export(output_dir, config, weights, tokenizer_dir=None, metadata={}, dtype=torch.float32)


def test_two_at_the_same_time(tmp_path: Path) -> None:
    """The second is refused and leaves the first one's files alone."""
    (tmp_path / ".e.tmp").mkdir()
    (tmp_path / ".e.tmp" / "left by a process that was killed").touch()
    with sole_writer(tmp_path / ".e.tmp", tmp_path / "e"):
        (tmp_path / ".e.tmp" / "of the first").touch()
        with pytest.raises(CheckpointError, match="e is being written by another process right now"):
            write_into(tmp_path / "e")
        assert os.listdir(tmp_path / ".e.tmp") == ["of the first"]
    write_into(tmp_path / "e")
    assert "of the first" not in os.listdir(tmp_path / "e")
    assert os.listdir(tmp_path) == ["e"]


def test_a_folder_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", ""):
        with pytest.raises(CheckpointError, match="is the folder that the command runs in, which cannot be replaced"):
            write_into(Path(name))
    (tmp_path / "e").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda path: True)
        with pytest.raises(CheckpointError, match="is a mount point, which cannot be replaced"):
            write_into(tmp_path / "e")
    write_into(Path("e") / ".." / "e")
    assert read_export(tmp_path / "e").config == CONFIGS["kraken"]


def test_what_a_killed_attempt_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".e.tmp" / "tokenizer").mkdir(parents=True)
    (tmp_path / ".e.tmp" / "model.safetensors").write_bytes(b"half of it")
    write_into(tmp_path / "e")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    written = [SUMS_FILE, "config.json", "model.safetensors", "modeling_kraken.py"]
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == written


def test_all_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    config = CONFIGS["kraken"]
    weights = rough_model(config).state_dict()
    write_export(tmp_path / "e", config, weights, tokenizer_dir=tokenizer_dir, metadata={}, dtype=torch.float32)
    written = {path.name for path in (tmp_path / "e").rglob("*")} | {".e.tmp"}
    assert "tokenizer.model" in written
    assert set(events[: events.index("rename")]) == written
    assert events[events.index("rename") :] == ["rename", tmp_path.name]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints.exports.folder.save_file", full_disk)
    config = CONFIGS["kraken"]
    with pytest.raises(CheckpointError, match="No space left"):
        write_export(
            tmp_path / "e",
            config,
            rough_model(config).state_dict(),
            tokenizer_dir=None,
            metadata={},
            dtype=torch.float32,
        )
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    config: ModelConfig = dataclasses.replace(CONFIGS["kraken"], vocab_size=64)
    with pytest.raises(CheckpointError, match="320 tokens, but the model's vocabulary only 64"):
        write_export(
            tmp_path / "e",
            config,
            rough_model(config).state_dict(),
            tokenizer_dir=tokenizer_dir,
            metadata={},
            dtype=torch.float32,
        )


def test_reading_something_else(tmp_path: Path, export_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_export(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_export(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        read_export(export_dir).load_tokenizer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 6}, "format_version=6, and this program knows up to 5"),
        ({"format_version": "new"}, "format_version=new"),
        ({"model_type": "gpt2"}, "model_type is not kraken"),
        ({"heads_per_sub_layer": 3}, "does not divide"),
        ({"hidden_size": "wide"}, "does not describe a model"),
        ({"rotary": True}, "rotary is not a setting"),
        ({"num_layers": 4}, "lacks the weight layers.3"),
        ({"num_layers": 2}, "has an unexpected weight layers.2"),
        ({"vocab_size": 384}, r"token_embedding.weight of shape \(320, 16\), but its settings say \(384, 16\)"),
        ({"dtype": "int4"}, "dtype=int4"),
    ],
)
def test_settings_that_do_not_fit(export_dir: Path, changes: dict[str, object], message: str) -> None:
    edit_config(export_dir, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_export(export_dir)


def test_damaged_files(export_dir: Path) -> None:
    weights = export_dir / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 4, 100, len(content) - 1):
        weights.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            read_export(export_dir)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_export(export_dir)
    weights.write_bytes(content)
    (export_dir / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_export(export_dir)


def test_a_missing_weight(export_dir: Path) -> None:
    path = export_dir / "model.safetensors"
    weights = load_file(path)
    del weights["conjunction.weight"]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"lacks the weight conjunction\.weight"):
        read_export(export_dir)


def test_an_export_of_an_older_layout(tmp_path: Path) -> None:
    for name, refused in (("kraken", False), ("standard", True)):
        write_small_export(tmp_path / name, CONFIGS[name], None)
        edit_config(tmp_path / name, format_version=1)
        if not refused:  # a Kraken's weights have always been stored as they are now
            assert read_export(tmp_path / name).config == CONFIGS[name]
            continue
        with pytest.raises(CheckpointError, match="format_version=1, of a program from before grouped-query attention"):
            read_export(tmp_path / name)
