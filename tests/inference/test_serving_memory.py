"""What serving is said to take, against what the modules hold and what PyTorch's own memory tracker sees."""

from __future__ import annotations

import pytest
import torch
from helpers import MODERN, random_ids, small_configs
from torch.distributed._tools.mem_tracker import MemTracker

from kraken_train.common.errors import ConfigError
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.memory import ServingMemory, free_memory, require_memory, serving_memory
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.registry import build_model
from kraken_train.parallel.sharding import UnitRange, all_units

SIZES = {"num_layers": 3, "vocab_size": 1024, "context_length": 256}
CASES = [
    (KrakenConfig(4, hidden_size=128, heads_per_sub_layer=4, **SIZES), UnitRange(4, 0, 4)),
    (KrakenConfig(4, hidden_size=128, heads_per_sub_layer=4, kv_heads_per_sub_layer=1, **SIZES), UnitRange(4, 1, 1)),
    (GPTConfig(hidden_size=256, num_heads=8, **SIZES), all_units(8)),
    (GPTConfig(hidden_size=256, num_heads=8, num_kv_heads=4, **SIZES), UnitRange(4, 2, 1)),
    (GPTConfig(hidden_size=256, num_heads=8, architecture="parallel", **SIZES), UnitRange(8, 0, 2)),
    (KrakenConfig(4, hidden_size=128, heads_per_sub_layer=2, head_dim=64, **SIZES, **MODERN), UnitRange(4, 0, 2)),
    (
        KrakenConfig(4, hidden_size=128, heads_per_sub_layer=2, ffn_reads_stream=True, **SIZES, **MODERN),
        UnitRange(4, 0, 2),
    ),
    (KrakenConfig(4, hidden_size=128, heads_per_sub_layer=4, embedding_size=192, **SIZES), UnitRange(4, 2, 2)),
    (GPTConfig(hidden_size=256, num_heads=8, **SIZES, **MODERN), all_units(8)),
]


@pytest.mark.parametrize(("config", "units"), CASES, ids=lambda value: getattr(value, "architecture", ""))
def test_against_the_memory_tracker(config: ModelConfig, units: UnitRange) -> None:
    batch_size, capacity = 2, 200
    expected = serving_memory(config, units, batch_size, capacity, torch.float32)
    model = build_model(config, units=units)
    assert expected.weights == sum(parameter.nbytes for parameter in model.parameters())
    engine = InferenceEngine(model, batch_size, capacity)
    assert expected.cache == sum(store.keys.nbytes + store.values.nbytes for store in engine.cache.prefill)
    with MemTracker() as tracker:
        engine.prefill(random_ids(config, batch_size, capacity), torch.full((batch_size,), capacity))
    seen = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    activations = seen["_MemRefType.ACT"] - expected.cache  # it sees the cache as something that is computed
    assert 0.8 * expected.activations < activations <= 1.02 * expected.activations


def test_bytes_follow_the_dtype_and_the_prompt() -> None:
    config = small_configs()["kraken"]
    units = all_units(3)
    wide = serving_memory(config, units, 2, 20, torch.float32)
    narrow = serving_memory(config, units, 2, 20, torch.bfloat16)
    assert (wide.weights, wide.cache, wide.activations) == tuple(
        2 * size for size in (narrow.weights, narrow.cache, narrow.activations)
    )
    short = serving_memory(config, units, 2, 20, torch.float32, prompt_tokens=5)
    assert short.cache == wide.cache
    assert short.activations < wide.activations / 2


def test_the_error_names_the_memory_of_each_device() -> None:
    needs = [ServingMemory(3 * 2**30, 2**30, 2**29), ServingMemory(2**30, 2**29, 0)]
    require_memory(needs, [5 * 2**30, 2 * 2**30], "the export e")
    with pytest.raises(ConfigError) as error:
        require_memory(needs, [5 * 2**30, 2**30], "the export e")
    assert str(error.value).startswith(
        "the export e does not fit into memory: device 0 needs 4.50 GiB (weights 3.00 GiB, key-value cache 1.00 GiB, "
        "activations 0.50 GiB) and has 5.00 GiB free; device 1 needs 1.50 GiB"
    )


def test_processes_share_the_memory_of_a_machine() -> None:
    alone, shared = free_memory(torch.device("cpu")), free_memory(torch.device("cpu"), processes=4)
    assert 0.2 < shared / alone < 0.3
