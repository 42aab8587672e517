"""What the vLLM plugin sets and refuses of vLLM's settings, with stand-ins for the modules of vLLM that it imports."""

from __future__ import annotations

import enum
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from plugin_ranks import plugin_config

from kraken_train.model.config import GPTConfig, KrakenConfig

COMMON = {"vocab_size": 96, "context_length": 24, "num_layers": 3}
KRAKEN = KrakenConfig(4, hidden_size=16, heads_per_sub_layer=2, **COMMON)
STANDARD = GPTConfig(hidden_size=32, num_heads=4, **COMMON)


class CUDAGraphMode(enum.Enum):
    NONE = 0
    PIECEWISE = 1
    FULL_DECODE_ONLY = 2
    FULL_AND_PIECEWISE = 3

    def has_piecewise_cudagraphs(self) -> bool:
        return "PIECEWISE" in self.name


@pytest.fixture(params=["cuda", "cpu"])
def platform(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, platform: str) -> Any:
    """`kraken_vllm.settings.KrakenSettings` on a platform."""
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"CUDAGraphMode": CUDAGraphMode},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {"VerifyAndUpdateConfig": object},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cuda_alike=lambda: platform == "cuda")},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kraken_vllm.settings", raising=False)
    yield importlib.import_module("kraken_vllm.settings").KrakenSettings
    sys.modules.pop("kraken_vllm.settings", None)  # it belongs to the stand-ins


def vllm_config(
    model: KrakenConfig | GPTConfig, size: int, mode: CUDAGraphMode | None = None, ubatching: bool = False
) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=plugin_config(model), max_model_len=24),
        parallel_config=SimpleNamespace(tensor_parallel_size=size, use_ubatching=ubatching),
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
    )


@pytest.mark.parametrize(("model", "size", "is_set"), [(KRAKEN, 2, True), (KRAKEN, 1, False), (STANDARD, 2, False)])
def test_graphs_of_whole_decode_steps(model: Any, size: int, is_set: bool, settings: Any, platform: str) -> None:
    config = vllm_config(model, size)
    settings.verify_and_update_config(config)
    expected = CUDAGraphMode.FULL_DECODE_ONLY if is_set and platform == "cuda" else None
    assert config.compilation_config.cudagraph_mode is expected


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_graphs_that_end_within_a_sum_are_refused(mode: CUDAGraphMode, settings: Any) -> None:
    with pytest.raises(ValueError, match=rf"cudagraph_mode={mode.name} .* use FULL_DECODE_ONLY"):
        settings.verify_and_update_config(vllm_config(KRAKEN, 2, mode))
    for model, size in ((KRAKEN, 1), (STANDARD, 2)):  # these have no sum that is under way
        config = vllm_config(model, size, mode)
        settings.verify_and_update_config(config)
        assert config.compilation_config.cudagraph_mode is mode


def test_what_the_user_chose_stays(settings: Any) -> None:
    config = vllm_config(KRAKEN, 2, CUDAGraphMode.NONE)
    settings.verify_and_update_config(config)
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.NONE


def test_refusals(settings: Any) -> None:
    with pytest.raises(ValueError, match="--tensor-parallel-size 3 does not divide num_sub_layers=4"):
        settings.verify_and_update_config(vllm_config(KRAKEN, 3))
    with pytest.raises(ValueError, match=r"dual batch overlap .* leave it out"):
        settings.verify_and_update_config(vllm_config(KRAKEN, 2, ubatching=True))
