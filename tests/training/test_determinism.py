"""What deterministic=true sets, and what it refuses before a training starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.common import settings

from kraken_train.common.errors import ConfigError
from kraken_train.training import determinism
from kraken_train.training.determinism import deterministic_algorithms, prepare_deterministic

CONFIG = replace(settings(), deterministic=True)
COMPILED = replace(CONFIG, engine=replace(CONFIG.engine, compile=None))  # by default, on a GPU


def test_a_gpu_gets_its_environment() -> None:
    found: dict[str, str] = {}
    prepare_deterministic(COMPILED, "cuda", found)
    assert found == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
    chosen = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_NVLS_ENABLE": "0", "NCCL_ALGO": "^NVLS"}
    prepare_deterministic(CONFIG, "cuda", kept := dict(chosen))
    assert kept == chosen


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, r"CUBLAS_WORKSPACE_CONFIG=:0:0.* use :4096:8 or :16:8, or determ"),
        ({"NCCL_NVLS_ENABLE": "1"}, r"NCCL_NVLS_ENABLE=1, .* unset it, use 0, or deterministic=false"),
        ({"NCCL_ALGO": "nvlstree"}, r"NCCL_ALGO=nvlstree, .* use Ring or Tree, or deterministic=false"),
    ],
)
def test_an_environment_that_contradicts(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_deterministic(CONFIG, "cuda", dict(environment))
    prepare_deterministic(CONFIG, "cpu", kept := dict(environment))  # where neither computes
    assert kept == environment


def test_a_compiler_that_chooses_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism.importlib, "import_module", lambda name: object())  # an older PyTorch's
    with pytest.raises(ConfigError, match=r"with engine\.compile=true: the compiler of PyTorch"):
        prepare_deterministic(COMPILED, "cuda", {})
    with pytest.raises(ConfigError, match=r"use attention_within_documents=false, or deterministic=false"):
        prepare_deterministic(replace(CONFIG, attention_within_documents=True), "cuda", {})
    prepare_deterministic(CONFIG, "cuda", {})


def test_an_operation_without_a_deterministic_algorithm() -> None:
    def compute() -> torch.Tensor:
        return torch.zeros(3).put_(torch.tensor([0, 1]), torch.ones(2))

    with pytest.raises(ConfigError, match=r"^deterministic=true, but put_ has no deterministic implementation on this"):
        use(enabled=True, compute=compute)
    assert not torch.are_deterministic_algorithms_enabled()
    assert use(enabled=False, compute=compute).sum() == 2
    with pytest.raises(RuntimeError, match="must match"):  # any other error stays what it is
        use(enabled=True, compute=lambda: torch.zeros(2) + torch.zeros(3))


def use(enabled: bool, compute: Any) -> Any:
    with deterministic_algorithms(enabled):
        assert torch.are_deterministic_algorithms_enabled() == enabled
        return compute()
