"""Who a process is, by what launchers put into its environment."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kraken_train.common.errors import ConfigError, RendezvousError, TrainingError
from kraken_train.parallel import ranks, rendezvous
from kraken_train.parallel.ranks import Runtime, free_port, read_runtime
from kraken_train.parallel.rendezvous import Meeting, describe_ranks

VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
)


TWO_RANKS = [Runtime(rank, rank, 2, 2) for rank in range(2)]


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
        Meeting(runtime, 1.0)


def test_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="RANK='one' is not a number"):
        read_runtime()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": 2}, "WORLD_SIZE=2 of a launcher, but this process is alone, so WORLD_SIZE must be 1"),
        ({"LOCAL_RANK": 1}, "LOCAL_RANK must be 0"),
        ({"LOCAL_WORLD_SIZE": 8}, "LOCAL_WORLD_SIZE must be 1"),
        ({"RANK": 0}, "RANK=0 of a launcher, but LOCAL_RANK and WORLD_SIZE are missing"),
        ({"RANK": 0, "LOCAL_RANK": 0}, "RANK=0 LOCAL_RANK=0 of a launcher, but WORLD_SIZE is missing; .*: unset RANK"),
        ({"RANK": 1, "WORLD_SIZE": 2}, "LOCAL_RANK is missing"),
        ({"RANK": 2, "LOCAL_RANK": 0, "WORLD_SIZE": 2}, "RANK must be less than WORLD_SIZE"),
        ({"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 4, "LOCAL_SIZE": 2}, "LOCAL_RANK must be less than LOCAL_WORLD"),
        ({"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 8}, "must not be more than WORLD_SIZE"),
        ({"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_SIZE": 4}, "LOCAL_SIZE must be 2"),
        ({"SLURM_PROCID": 1, "SLURM_LOCALID": 1, "SLURM_STEP_NUM_TASKS": 4, "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
          "WORLD_SIZE": 2}, "this process is rank 1 of 4, so WORLD_SIZE must be 4"),
    ],
)  # fmt: skip
def test_variables_that_contradict(monkeypatch: pytest.MonkeyPatch, values: dict[str, object], message: str) -> None:
    """Such as a container leaves behind: who believes them waits for ranks that nobody starts."""
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=message):
        read_runtime()


def test_variables_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": "", "MASTER_ADDR": "gone"}.items():
        monkeypatch.setenv(name, value)
    assert read_runtime() == Runtime(0, 0, 1, 1)
    values = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "3"}
    for name, value in {**values, "SLURM_STEP_TASKS_PER_NODE": "2,1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of the second machine
    assert read_runtime() == Runtime(2, 0, 3, 2)


def test_a_process_alone_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was left in the environment is of a machine that is not there."""
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # reserved for documentation
    monkeypatch.setenv("MASTER_PORT", "29500")
    store = rendezvous.connect_ranks(read_runtime())
    try:
        store.set("key", "value")
        assert store.get("key") == b"value"
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    port = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    return f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"


@pytest.mark.usefixtures("address")
def test_ranks_meet() -> None:
    stores: list[dist.Store] = []
    second = threading.Thread(target=lambda: stores.append(Meeting(TWO_RANKS[1], 60.0).store()))
    second.start()
    first = Meeting(TWO_RANKS[0], 60.0).store()
    second.join()
    first.set("key", "value")
    assert stores[0].get("key") == b"value"


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize("shared", [True, False])
def test_gpus_are_compared_before_nccl_connects(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr(rendezvous, "name_of_gpu", lambda device: "GPU-1" if shared else f"GPU-{device.index}")
    monkeypatch.setattr(Runtime, "device", property(lambda self: torch.device("cuda", self.local_rank)))
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "n1")
    outcomes: dict[int, str] = {}

    def compare(runtime: Runtime) -> None:
        try:
            rendezvous.require_own_gpus(runtime, Meeting(runtime, 60.0).store())  # which ends with this call
            outcomes[runtime.rank] = ""
        except ConfigError as error:
            outcomes[runtime.rank] = str(error)

    threads = [threading.Thread(target=compare, args=(runtime,)) for runtime in TWO_RANKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    message = "ranks 0, 1 on n1 would share one GPU; start as many ranks per machine as it has GPUs" if shared else ""
    assert outcomes == {0: message, 1: message}


@pytest.mark.parametrize(("gpus", "ranks"), [(True, 2), (True, 1), (False, 2)])
def test_nccl_connects_at_the_start(monkeypatch: pytest.MonkeyPatch, gpus: bool, ranks: int) -> None:
    """On this rank's GPU. Groups that are made later are not split from that connection."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    events: list[object] = []
    world = SimpleNamespace(bound_device_id=torch.device("cuda", 0))
    monkeypatch.setattr(rendezvous, "require_own_gpus", lambda runtime, store: events.append("compared"))
    monkeypatch.setattr(rendezvous.dist, "init_process_group", lambda *_, **given: events.append(given["device_id"]))
    monkeypatch.setattr(rendezvous.dist, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(Meeting, "store", lambda self: dist.HashStore())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    rendezvous.connect_ranks(Runtime(ranks - 1, ranks - 1, ranks, ranks))
    if gpus and ranks > 1:
        assert events == ["compared", torch.device("cuda", 0)]
        assert world.bound_device_id is None
    else:
        assert events == [None]


@pytest.mark.usefixtures("address")
def test_all_who_are_there_hear_who_is_not() -> None:
    errors: list[str] = []

    def meet(rank: int, seconds: float) -> None:
        with pytest.raises(RendezvousError) as raised:
            Meeting(Runtime(rank, rank, 3, 3), seconds).store()
        errors.append(str(raised.value))

    second = threading.Thread(target=meet, args=(1, 3600.0))
    second.start()
    meet(0, 1.0)
    second.join()
    assert errors[0] == errors[1]
    assert "2 of 3 ha" in errors[0]  # rank 1 may have been late as well


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        (Runtime(0, 0, 5, 5), "ranks 1-4 of 5 have not connected"),
        (TWO_RANKS[0], "rank 1 of 2 has not connected"),
        (TWO_RANKS[1], r"rank 0 does not answer \(Connection refused\)"),
    ],
)
def test_a_waiting_rank_reports_which_are_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
    runtime: Runtime,
    reason: str,
) -> None:
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 0.0)
    with pytest.raises(RendezvousError, match=f"could not meet at {address}: {reason} within 0.2 s"):
        Meeting(runtime, 0.2).store()
    reported = capsys.readouterr().err.splitlines()
    if runtime.local_rank:
        assert reported == [], "one rank of a machine is enough"
    else:
        assert len(reported) == 1
        assert reported[0].startswith(f"rank {runtime.rank} waits at {address}: ")


def test_ranks_in_words() -> None:
    assert describe_ranks([3]) == "rank 3"
    assert describe_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


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

    class ReachedError(Exception):
        pass

    def all_reduce(tensor: torch.Tensor, group: object) -> None:
        raise ReachedError(tensor.device.type)

    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(Runtime, "device", torch.device("meta"))
    with pytest.raises(ReachedError, match=device):
        Runtime(0, 0, 2, 2).sum([1.0])


def test_a_free_port_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is none of those that Linux by default gives to a socket that asks for any, and nothing listens on it."""
    assert all(1024 <= free_port() < 32768 for _ in range(50))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ranks, "PORTS", range(port, port + 1))
        with pytest.raises(TrainingError, match=f"none of 1000 ports from {port} to {port} is free"):
            free_port()
