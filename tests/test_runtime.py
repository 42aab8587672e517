"""Who a process is, by what launchers put into its environment."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from kraken_train.errors import ConfigError
from kraken_train.runtime import Runtime, export_rendezvous, read_runtime

VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


def test_alone() -> None:
    assert read_runtime() == Runtime(0, 0, 1, 1)


def test_torchrun_and_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert read_runtime() == Runtime(5, 1, 8, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert read_runtime() == Runtime(5, 1, 8, 2)


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert read_runtime() == Runtime(0, 0, 1, 1), "a batch script is no task of the job's four"
    values = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    runtime = read_runtime()
    assert runtime == Runtime(3, 1, 4, 2)
    with pytest.raises(ConfigError, match="4 ranks need MASTER_ADDR and MASTER_PORT"):
        export_rendezvous(runtime)


def test_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="RANK='one' is not a number"):
        read_runtime()


def test_errors_reach_all_ranks_alone() -> None:
    def fail() -> None:
        raise ConfigError("wrong")

    with pytest.raises(ConfigError, match="wrong"):
        Runtime(0, 0, 1, 1).on_first(fail)
    assert Runtime(0, 0, 1, 1).on_first(lambda: 7) == 7
    assert Runtime(0, 0, 1, 1).gather("mine") == ["mine"]
    assert Runtime(0, 0, 1, 1).sum([1.5, 2.0]) == [1.5, 2.0]


@pytest.mark.parametrize(
    ("backends", "device"),
    [("cuda:nccl", "meta"), ("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu")],
)
def test_sums_go_where_the_group_can_communicate(monkeypatch: pytest.MonkeyPatch, backends: str, device: str) -> None:
    """A device named meta stands for the rank's GPU. Groups of ranks are tried in checkpoints/test_store.py."""

    class Reached(Exception):
        pass

    def all_reduce(tensor: torch.Tensor, group: object) -> None:
        raise Reached(tensor.device.type)

    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(Runtime, "device", torch.device("meta"))
    with pytest.raises(Reached, match=device):
        Runtime(0, 0, 2, 2).sum([1.0])
