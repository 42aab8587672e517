"""Training speed on a GPU: a derived Kraken keeps up with the standard Transformer of its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import launch_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.slow  # it measures a speed
def test_derived_kraken_beside_gpt2(tmp_path: Path) -> None:
    """At the defaults' 20 x 1024 tokens in bf16, compiled; takes a few minutes."""
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB")
    models = "models=[gpt2-124m,kraken-125m-4way,kraken-125m-4way-hw]"
    settings = (models, "rounds=5", "steps=5", f"output_dir={tmp_path}")
    launch_ranks(1, "-m", "kraken_train.bench.throughput", *settings, device="cuda")
    record = json.loads((tmp_path / "throughput.json").read_text())
    results = {result["model"]: result for result in record["results"]}
    for result in results.values():
        assert sum(result["phase_seconds"].values()) == pytest.approx(result["step_seconds"]["median"], rel=0.02)
        assert result["peak_memory"]["kind"] == "torch.cuda.max_memory_allocated"
        assert 2e9 < result["peak_memory"]["bytes"] < 70e9
        assert result["mfu"] is None or 0.05 < result["mfu"]["total"] < 1
    assert results["kraken-125m-4way-hw"]["to_reference"]["median"] >= 0.75
    assert results["kraken-125m-4way-hw"]["tokens_per_second"] > results["kraken-125m-4way"]["tokens_per_second"]
