"""The fused kernels against their twins in PyTorch, on a CPU; `test_kernels_gpu` has the same on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import REPOSITORY
from helpers import small_configs
from kernels.cases import TOLERANCES

from kraken_train.common.errors import ConfigError
from kraken_train.kernels import selection, twins
from kraken_train.kernels.selection import choose_kernels, fits_kernels, use_kernels
from kraken_train.model.config import KrakenConfig
from kraken_train.model.registry import build_model

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run_apart(script: str, report: Path, *arguments: str, **environment: str) -> Any:
    """What a script writes. In a process of its own: what Triton is, is decided when it is imported."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, str(REPOSITORY / "tests" / "kernels" / script), str(report), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_apart("interpreted.py", tmp_path_factory.mktemp("kernels") / "report.json", TRITON_INTERPRET="1")


@needs_triton
def test_each_kernel_is_its_twin(interpreted: dict[str, Any]) -> None:
    """Results and all gradients: several blocks, masks, both norms and activations, grouped heads, rotations."""
    cases = interpreted["kernels"]
    functions = {"layer_entry", "ffn_entry", "activated_product", "split_heads"}
    for dtype, tolerance in TOLERANCES.items():
        of_type = [case for case in cases if case["dtype"] == dtype]
        assert {case["case"] for case in of_type} == functions
        for case in of_type:
            assert max(case["errors"].values()) < tolerance, case


@needs_triton
def test_a_model_with_kernels_is_the_same_model(interpreted: dict[str, Any]) -> None:
    """The loss and all gradients in float64, and logits with a cache."""
    assert set(interpreted["models"]) == {"gelu", "rope", "computed again", "exchanged", "compiled"}
    for case, error in interpreted["models"].items():
        assert error < 1e-12, case
    assert interpreted["inference"] < 1e-12


@needs_triton
def test_benchmark(interpreted: dict[str, Any]) -> None:
    """Each kernel once, with the bytes of its tensors: 2 sub-layers, 1 x 2 tokens of 8 values, FFN 16, bf16."""
    found = {one["name"]: one for one in interpreted["benchmark"]}
    stream, one, inner, packed = 2 * 2 * 8 * 2, 2 * 8 * 2, 2 * 2 * 16 * 2, 2 * 2 * 24 * 2
    forward = {"layer_entry": 4 * stream + one, "ffn_entry": 4 * stream + one, "gelu": 2 * inner, "swiglu": 3 * inner}
    both = {"layer_entry": 8 * stream + 2 * one, "ffn_entry": 8 * stream + 3 * one, "split_heads": 2 * packed}
    assert {name: case["bytes"] for name, case in found.items()} == {
        **{f"{name}, forward": size for name, size in forward.items()},
        **{f"{name}, forward and backward": size for name, size in both.items()},
        "gelu, backward": 4 * inner,
        "swiglu, backward": 6 * inner,
        "split_heads, forward, with rope": 2 * packed,
        "split_heads, forward and backward, with rope": 4 * packed,
    }
    for case in found.values():
        assert case["bytes_per_second"] == pytest.approx(case["bytes"] / case["seconds"])
        assert case["speed_up"] == pytest.approx(case["twin_seconds"] / case["seconds"])


WRITES = {
    "layer_entry_kernel": {"y", "sum", "normed", "mean", "reciprocal"},
    "layer_entry_backward_kernel": {"gradient", "gain_gradient"},
    "ffn_entry_kernel": {"residual", "normed", "mean", "reciprocal"},
    "ffn_entry_backward_kernel": {"own_gradient", "total_gradient", "gain_gradient"},
    "gelu_kernel": {"result"},
    "gelu_backward_kernel": {"up_gradient", "result"},
    "swiglu_kernel": {"result"},
    "swiglu_backward_kernel": {"gate_gradient", "up_gradient", "result"},
    "pack_kernel": {"packed"},
}


@needs_triton
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_compilation_sees(compiled: bool, tmp_path: Path) -> None:
    """PyTorch traces the real kernels, forward and backward, and finds what they write to.

    Compiled, each becomes code for an H100 that keeps its values in registers.
    """
    found = run_apart("traced.py", tmp_path / "report.json", *(["compile"] if compiled else []), TRITON_INTERPRET="0")
    assert {kernel["kernel"] for kernel in found} == set(WRITES)
    for kernel in found:
        assert {name.removesuffix("_pointer") for name in kernel["writes"]} == WRITES[kernel["kernel"]]
        assert kernel["local"] == (0 if compiled else None), kernel


@pytest.mark.parametrize("reads_stream", [False, True])
def test_twins_are_the_model(reads_stream: bool) -> None:
    """A layer of the model, put together from the twins."""
    config = KrakenConfig(
        2, 2, hidden_size=24, heads_per_sub_layer=2, vocab_size=32, context_length=8, ffn_reads_stream=reads_stream
    )
    model = build_model(config).double()
    first, second = (layer for layer in model.layers)
    x = torch.randn(2, 1, 8, 24, dtype=torch.float64)
    ffn, norm = first.ffn, second.attention.norm
    attended, total = first.attention(x), x.sum(0)
    residual, normed = twins.ffn_entry(x, attended, total, ffn.norm.weight, config.norm_epsilon, True, reads_stream)
    added = twins.activated_product(None, ffn.up(normed), ffn.down.weight)
    y, part, entered = twins.layer_entry(residual, added, norm.weight, config.norm_epsilon, True, torch.float64)
    expected = ffn(x, attended, total)
    torch.testing.assert_close((y, part, entered), (expected, expected.sum(0), norm(expected)))


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert not choose_kernels(None, cpu, "engine.fused_kernels")
    for device in (cpu, gpu):
        assert not choose_kernels(False, device, "engine.fused_kernels")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not choose_kernels(None, gpu, "engine.fused_kernels")
    with pytest.raises(ConfigError, match=r"engine.fused_kernels=true, but Triton is not installed; install triton"):
        choose_kernels(True, gpu, "engine.fused_kernels")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "found")
    assert choose_kernels(None, gpu, "engine.fused_kernels")
    assert choose_kernels(True, gpu, "engine.fused_kernels")
    monkeypatch.setattr(selection, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match=r"fused_kernels=true needs a GPU, and this runs on cpu; use null or false"):
        choose_kernels(True, cpu, "fused_kernels")
    monkeypatch.setattr(selection, "interpreted", lambda: True)
    assert choose_kernels(True, cpu, "fused_kernels")


def test_large_tiles_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 sub-layers of 4096 values are the most; 3 of 4100 need as much room as 4 of 8192."""
    assert fits_kernels(4, 4096)
    assert fits_kernels(1, 12288)
    assert not fits_kernels(3, 4100)
    with torch.device("meta"):
        config = KrakenConfig(3, 1, hidden_size=4100, heads_per_sub_layer=1, vocab_size=32, context_length=8)
        model = build_model(config)
    monkeypatch.setattr(selection, "choose_kernels", lambda *_: True)
    use_kernels(model, None, torch.device("cuda"), "fused_kernels")
    assert not any(getattr(module, "kernels", None) for module in model.modules())
    with pytest.raises(ConfigError, match=r"engine\.fused_kernels=true, but .* at most 16384 values of a token"):
        use_kernels(model, True, torch.device("cuda"), "engine.fused_kernels")


def test_baselines_have_none() -> None:
    """The setting is no error for them: a benchmark compares all architectures with the same settings."""
    for name in ("standard", "parallel"):
        model = build_model(small_configs()[name])
        model.use_fused_kernels()
        assert not any(getattr(module, "kernels", None) for module in model.modules())
