"""The same training on a GPU as on the CPU. One GPU takes one NCCL rank."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import launch_ranks
from parity import engine_modes, run_ranks

from kraken_train.bench import kv_memory
from kraken_train.bench.kv_memory import KVMemoryConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TRAJECTORIES = ["kraken-4/1/plain", "kraken-4/1/compile-recompute-bf16"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("gpu")
    for device in ("cuda", "cpu"):
        checks = ["modes:1", "trajectories:" + ",".join(TRAJECTORIES), "events:1"]
        launch_ranks(1, str(run_ranks.__file__), str(folder / device), str(folder), *checks, device=device)
    return {device: json.loads((folder / device).read_text()) for device in ("cuda", "cpu")}


def test_modes_of_the_engine(reports: dict[str, dict]) -> None:
    for precision, zero_stage, optimizer in engine_modes.MODES_AT[1]:
        on_gpu, on_cpu = (report["modes"][f"1 {precision} {zero_stage} {optimizer}"] for report in reports.values())
        tolerance = {"fp32": 1e-4, "bf16": 2e-2}[precision]
        for found, expected in zip(on_gpu["steps"], on_cpu["steps"], strict=True):
            assert found == pytest.approx(expected, rel=tolerance)
        for found, expected in zip(on_gpu["resumed"], on_gpu["steps"][3:], strict=True):
            assert found == pytest.approx(expected, rel=tolerance)
        assert on_gpu["poisoned"][2] == [None, None, False]
        assert on_gpu["unchanged_by_nan"]
        assert on_gpu["recovers"]
        assert on_gpu["host_reads"] == {"steps": 0, "results": 2}  # by torch.cuda.set_sync_debug_mode, too


def test_trajectories(reports: dict[str, dict]) -> None:
    for case in TRAJECTORIES:
        on_gpu, on_cpu = (report["trajectories"][case] for report in reports.values())
        for found, expected in zip(on_gpu, on_cpu, strict=True):
            assert found == pytest.approx(expected, rel=1e-2 if "bf16" in case else 1e-4)


def test_order_of_events(reports: dict[str, dict]) -> None:
    on_gpu, on_cpu = (report["events"]["1"] for report in reports.values())
    assert on_gpu == on_cpu


def test_memory_for_serving() -> None:
    """What is computed is what the allocator hands out, but for its rounding (512 bytes an allocation)."""
    config = KVMemoryConfig(
        architectures=("kraken", "standard"), sizes=("tiny",), attention=("mha", "mqa"), degrees=(2,),
        contexts=(128, 1024), batch_sizes=(1, 4), heads_per_kv_head=4, vocab_size=4096, dtype="bfloat16",
        device="cuda", output_dir="",
    )  # fmt: skip
    for row in kv_memory.measure(kv_memory.compute(config), config, torch.device("cuda")):
        assert row.measured_weights == pytest.approx(row.weights, rel=0.01)
        assert row.measured_cache is not None
        assert row.cache <= row.measured_cache < 1.05 * row.cache + 20_000
