"""Training that starts with the weights of an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import launch_ranks, rough_model, run_module

from checkpoints.exports.folder import write_export
from checkpoints.exports.initial import open_initial_export
from checkpoints.training.store import read_weights
from integration.training import overrides
from kraken_train.common.errors import CheckpointError
from kraken_train.model.config import KrakenConfig

CONFIG = KrakenConfig(4, num_layers=2, hidden_size=16, heads_per_sub_layer=2, vocab_size=320, context_length=32)
STILL = ("optim.lr=1e-12", "optim.weight_decay=0", "schedule=constant", "validation.every=0")


@pytest.fixture
def export_dir(data: Path, tmp_path: Path) -> Path:
    weights = rough_model(CONFIG, torch.float32).state_dict()
    write_export(tmp_path / "e", CONFIG, weights, tokenizer_dir=data / "tokenizer", metadata={}, dtype=torch.float32)
    return tmp_path / "e"


@pytest.mark.slow
def test_two_ranks_take_their_parts(data: Path, export_dir: Path, tmp_path: Path) -> None:
    """In bf16, whose fp32 masters must not be rounded, with a divided vocabulary; later the export is not needed."""
    run = tmp_path / "run"
    parallel = ("parallel.sub_layer_parallel_size=2", "parallel.vocab_parallel=true", "precision=bf16")
    launch_ranks(
        2,
        "-m",
        "kraken_train.train",
        *overrides(data, run, f"init_from={export_dir}", "max_steps=1", *STILL, *parallel),
    )
    trained = read_weights(run)
    assert trained.metadata["step"] == 1
    for name, expected in rough_model(CONFIG, torch.float32).state_dict().items():
        assert (trained.weights[name] - expected).abs().max() < 1e-7, name
    result = run_module("kraken_train.train", *overrides(data, run, "init_from=nowhere", "max_steps=2", *STILL))
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert "starting with" not in result.stdout


def test_what_cannot_be_the_start(export_dir: Path, tmp_path: Path) -> None:
    open_initial_export(export_dir, CONFIG, {})
    with pytest.raises(CheckpointError, match=r"init_from=.*nowhere is not a folder"):
        open_initial_export(tmp_path / "nowhere", CONFIG, {})
    with pytest.raises(CheckpointError, match=r"another model: model\.num_layers is 2 there and 3 here"):
        open_initial_export(export_dir, dataclasses.replace(CONFIG, num_layers=3), {})
    with pytest.raises(CheckpointError, match=r"another tokenizer .* \(tokenizer.model differs\)"):
        open_initial_export(export_dir, CONFIG, {"tokenizer.model": "0" * 64})
