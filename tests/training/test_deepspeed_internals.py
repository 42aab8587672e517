"""DeepSpeed is what was tested, and anything else is refused in one line; each rank claims the GPU that it has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.engine import DeepSpeedEngine
from helpers import REPOSITORY

from kraken_train.common.errors import ConfigError
from kraken_train.parallel.ranks import Runtime
from kraken_train.training import deepspeed_internals
from kraken_train.training.deepspeed_internals import BF16_OPTIMIZER, FINGERPRINTS, fingerprint


@pytest.fixture
def unprepared() -> Iterator[None]:
    deepspeed_internals.prepare.cache_clear()
    yield
    deepspeed_internals.prepare.cache_clear()


def test_fingerprints() -> None:
    """After tests/parity holds with another version of DeepSpeed, these are the new ones."""
    found = {name: fingerprint(name) for name in FINGERPRINTS}
    assert found == FINGERPRINTS, f"the fingerprints of DeepSpeed {deepspeed.__version__} are {found}"


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("change", ["is changed", "is no function", "is missing"])
def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    def step(self: Any, closure: Any = None) -> None:
        """Another step."""

    optimizer = deepspeed_internals.private(BF16_OPTIMIZER)
    if change == "is missing":
        monkeypatch.delattr(optimizer, "step")
        monkeypatch.delattr(optimizer.__mro__[1], "step", raising=False)
    else:
        monkeypatch.setattr(optimizer, "step", step if change == "is changed" else 3)
    with pytest.raises(ConfigError) as raised:
        deepspeed_internals.prepare()
    message = str(raised.value)
    assert "deepspeed.runtime.bf16_optimizer.BF16_Optimizer.step is not that of DeepSpeed 0.19.8" in message
    assert message.endswith("install deepspeed==0.19.8")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, None),
        ({"fp32_groups_gradients_flat": []}, "fp32_groups_gradients_flat"),
        ({"fp32_groups_gradient_flat_partition": [torch.zeros(4)]}, "fp32_groups_gradients_flat"),  # not a view
        ({"fp32_groups_gradients_flat": [torch.zeros(4)]}, "fp32_groups_gradients_flat"),  # of another size
        ({"fp32_groups_flat_partition": [torch.zeros(4, dtype=torch.bfloat16)]}, "fp32_groups_gradients_flat"),
    ],
)
def test_buffers_that_are_not_as_tested(changes: dict[str, Any], what: str | None) -> None:
    kind = deepspeed_internals.private(BF16_OPTIMIZER)
    zero = kind.__new__(kind)
    whole = torch.zeros(8)
    usual = {
        "optimizer": SimpleNamespace(param_groups=[{}]),
        "fp32_groups_gradients_flat": [whole],
        "fp32_groups_gradient_flat_partition": [whole[4:]],
        "fp32_groups_flat_partition": [torch.zeros(4)],
    }
    vars(zero).update(usual | changes)
    if what is None:
        deepspeed_internals.require_tested_layout(zero, copy=1, copies=2)
        with pytest.raises(ConfigError):  # it is the part of the other copy
            deepspeed_internals.require_tested_layout(zero, copy=0, copies=2)
        return
    with pytest.raises(ConfigError, match=f"{what} is not that of DeepSpeed 0.19.8"):
        deepspeed_internals.require_tested_layout(zero, copy=1, copies=2)


def test_zero_2_without_its_gradients() -> None:
    zero = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{}]))
    with pytest.raises(ConfigError, match="averaged_gradients is not that of"):
        deepspeed_internals.require_tested_layout(zero, copy=0, copies=1)


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(1, 3, 0), (4, 3, 3)])
def test_deepspeed_claims_the_device_of_the_rank(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
) -> None:
    """Also where the launcher shows each rank its own GPU only, of which LOCAL_RANK is not the index."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    device = Runtime(local_rank, local_rank, 4, 4).device
    claimed = []
    accelerator = SimpleNamespace(set_device=claimed.append, device_name=lambda number: f"cuda:{number}")
    monkeypatch.setattr("deepspeed.runtime.engine.get_accelerator", lambda: accelerator)
    monkeypatch.setattr("deepspeed.runtime.engine.dist", SimpleNamespace(get_world_size=lambda: 4, get_rank=lambda: 3))
    engine = SimpleNamespace(local_rank=local_rank)
    DeepSpeedEngine._set_distributed_vars(engine, deepspeed_internals.device_arguments(device))
    assert claimed == [index]
    assert engine.device == device


@pytest.mark.usefixtures("unprepared")
def test_operators_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would start compilers, and ask the GPU, for each operator on each rank."""

    def probe() -> None:
        raise AssertionError("probed")

    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", probe)
    deepspeed_internals.prepare()
    assert build_shm_op() is None


ONE_STEP = """
import torch
from kraken_train.parallel.ranks import Runtime
from kraken_train.training.engine import start_processes
from parity.common import MODELS, make_engine, run_steps

runtime = Runtime(rank=0, local_rank=1, world_size=1, local_world_size=2)
start_processes(runtime)
engine = make_engine(MODELS["kraken-4"], runtime, 1, precision="bf16")
run_steps(engine, MODELS["kraken-4"], range(1))
print("trained on", engine.deepspeed.device)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_rank_that_sees_one_gpu() -> None:
    """LOCAL_RANK is 1, as of the second task of a node whose tasks see one GPU each."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": first_gpu}
    result = subprocess.run(
        [sys.executable, "-c", ONE_STEP], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "trained on cuda:0" in result.stdout
