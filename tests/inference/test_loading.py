"""Shares of a model for any devices, and that each reads its own share of the file and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_ids, small_configs, write_small_export
from safetensors import safe_open

from checkpoints.exports.folder import read_export
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.inference import loading
from kraken_train.inference.loading import load_part, share_model
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.tensor_parallel_config import TensorParallelConfig
from kraken_train.parallel.communicator import LocalCommunicator
from kraken_train.parallel.sharding import all_units, sharded_dims, share_units

SIZES = {"num_layers": 2, "vocab_size": 96, "context_length": 24}
KRAKEN_6 = KrakenConfig(6, hidden_size=16, heads_per_sub_layer=2, **SIZES)
GQA = GPTConfig(hidden_size=48, num_heads=12, num_kv_heads=2, **SIZES)


def counts(config: ModelConfig, *speeds: float) -> list[int]:
    shares = share_model(config, speeds)
    assert [unit for share in shares for unit in share.ids] == list(range(shares[0].total))
    return [share.count for share in shares]


def test_shares() -> None:
    assert counts(KRAKEN_6, 1, 1, 1, 1) == [2, 2, 1, 1]
    assert counts(KRAKEN_6, 1, 1, 0.5) == [3, 2, 1]
    assert counts(KRAKEN_6, 0.1, 1) == [1, 5]
    assert counts(GQA, 1, 1) == [1, 1]
    # More devices than key-value heads: these are repeated, as often as it takes.
    assert counts(GQA, 1, 1, 1, 1) == [1, 1, 1, 1]
    assert counts(GQA, 1, 1, 1) == [2, 1, 1]
    assert counts(GQA, *[1] * 5) == [2, 1, 1, 1, 1]
    assert counts(GQA, *[1] * 12) == [1] * 12


@pytest.mark.parametrize("speeds", [(1, 1), (1, 0.5), (1, 0.4), (3, 2, 1), (1, 1, 0.5), (0.3, 1.7, 0.9)])
def test_no_other_share_is_done_earlier(speeds: tuple[float, ...]) -> None:
    for total in range(len(speeds), 9):
        possible = [c for c in itertools.product(range(1, total + 1), repeat=len(speeds)) if sum(c) == total]
        best = min(max(n / s for n, s in zip(c, speeds, strict=True)) for c in possible)
        found = [share.count for share in share_units(total, speeds)]
        assert sum(found) == total
        assert max(n / s for n, s in zip(found, speeds, strict=True)) == best


@pytest.mark.parametrize("speeds", [[], [1.0] * 4, [1.0, 0.0], [1.0, float("inf")]])
def test_shares_that_there_are_not(speeds: list[float]) -> None:
    with pytest.raises(ValueError, match="3 units cannot be shared"):
        share_units(3, speeds)


def test_too_many_devices() -> None:
    with pytest.raises(ConfigError, match=r"model.num_sub_layers=6 cannot be shared by 7 devices; start at most 6"):
        share_model(KRAKEN_6, [1] * 7)
    with pytest.raises(ConfigError, match=r"model.num_heads=12 cannot be shared by 13 devices; start at most 12"):
        share_model(GQA, [1] * 13)


class RecordingFile:
    """A safetensors file that notes how many values each tensor's slices had."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.file = safe_open(*arguments, **settings)

    def __enter__(self) -> RecordingFile:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def get_slice(self, name: str) -> Any:
        whole = self.file.get_slice(name)

        class Slice:
            get_shape = whole.get_shape

            def __getitem__(self, index: Any) -> torch.Tensor:
                part = whole[index]
                READ[name] = READ.get(name, 0) + part.numel()
                return part

        return Slice()


READ: dict[str, int] = {}


@pytest.mark.parametrize("architecture", [*small_configs(), "kraken-6", "standard-12"])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_each_device_reads_its_part(
    architecture: str, devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**small_configs(), "kraken-6": KRAKEN_6, "standard-12": GQA}[architecture]
    whole = write_small_export(tmp_path / "e", config, None)
    export = read_export(tmp_path / "e")
    monkeypatch.setattr(loading, "safe_open", RecordingFile)
    parts: list[LanguageModel] = []
    for units in share_model(config, [1.0] * devices):
        READ.clear()
        parts.append(load_part(export, units, LocalCommunicator(), torch.float64, torch.device("cpu")))
        assert {name: parameter.numel() for name, parameter in parts[-1].named_parameters()} == READ
        assert all(parameter.dtype == torch.float64 for parameter in parts[-1].parameters())
    repeated = parts[0].cache_shape[1] * devices > whole.cache_shape[1] and isinstance(config, TensorParallelConfig)
    for name, cut in sharded_dims(parts[0]).items():
        tensors = [part.get_parameter(name) for part in parts]
        if cut is None:
            assert all(torch.equal(tensor, whole.get_parameter(name).double()) for tensor in tensors)
        elif not (repeated and "qkv" in name):
            assert torch.equal(torch.cat(tensors, dim=cut.axis), whole.get_parameter(name).double())


def test_repeated_key_value_heads_are_the_same_model(tmp_path: Path) -> None:
    whole = write_small_export(tmp_path / "e", GQA, None).double()
    ids = random_ids(GQA, 2, 20)
    export, cpu = read_export(tmp_path / "e"), torch.device("cpu")
    for heads in (2, 4, 6, 12):
        model = load_part(export, all_units(heads), LocalCommunicator(), torch.float64, cpu)
        assert model.cache_shape == (1, heads, 4)
        assert (model(ids) - whole(ids)).abs().max() < 1e-12 * whole(ids).abs().max()


def test_a_file_that_is_lost_or_damaged_after_it_was_checked(tmp_path: Path) -> None:
    write_small_export(tmp_path / "e", KRAKEN_6, None)
    export = read_export(tmp_path / "e")
    path = tmp_path / "e" / "model.safetensors"
    content = path.read_bytes()
    for change in (lambda: path.write_bytes(content[:-1]), path.unlink):
        change()
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*; copy it again or export"):
            load_part(export, all_units(6), LocalCommunicator(), torch.float32, torch.device("cpu"))
