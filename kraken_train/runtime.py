"""The processes of a run: who this one is, and how all of them agree on something.

Reads the launcher's environment once (deepspeed and torchrun set RANK and friends, Slurm SLURM_PROCID and friends);
nothing else in the package does.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from kraken_train.errors import ConfigError, KrakenError, RendezvousError
from kraken_train.run_layout import LAUNCH_COMMAND

Result = TypeVar("Result")

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # for all ranks to start
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # for the slowest of what ranks wait for: a save or a read on a slow disk
# What gloo and NCCL say to the ranks that are left when one has died.
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")

# (rank, local rank, number of ranks, number of ranks on this machine), in order of preference.
LAUNCHER_VARIABLES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    # Set by srun for each task; the variables of the job itself are also there in a batch script, which is no task.
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", ("SLURM_STEP_TASKS_PER_NODE",)),
)


@dataclass(frozen=True)
class Runtime:
    """This process among the `world_size` processes of the run.

    `dataclasses.replace(runtime, group=...)` gives the same processes another channel to agree over, for example one
    that a second thread can use while the first trains.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    group: dist.ProcessGroup | None = None  # of all ranks, in their order; None: the default group
    use_gpu: bool = True  # where there is one

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This rank's GPU; the CPU where there is none or DS_ACCELERATOR=cpu asks for it. Raises ConfigError."""
        if not self.use_gpu or not gpu_is_usable():
            return torch.device("cpu")
        visible = torch.cuda.device_count()
        if visible > 1 and self.local_rank >= visible:
            raise ConfigError(
                f"rank {self.rank} is number {self.local_rank} on its machine, which has {visible} GPUs; start as many "
                "ranks per machine as it has GPUs"
            )
        # Where the launcher shows each rank its own GPU only, that one is number 0.
        return torch.device("cuda", self.local_rank if visible > 1 else 0)

    @property
    def backend(self) -> str:
        """Tensors on GPUs go through NCCL; gloo serves those on the CPU, where ranks agree on small things."""
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"

    def configure_device(self) -> None:
        """Claim this rank's GPU, or its share of the machine's cores."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // self.local_world_size))

    def take_peak_memory(self) -> float:
        """The most GiB that were allocated on this rank's GPU since the last call; on a CPU, those in use now."""
        if self.device.type != "cuda":
            return psutil.Process().memory_info().rss / 2**30
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak / 2**30

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0 and return its result on all ranks; an error is raised on all of them as well."""
        if self.world_size == 1:
            return function()
        outcome: list[Result | Exception | None] = [None]
        if self.is_first:
            try:
                outcome[0] = function()
            except KrakenError as error:
                outcome[0] = error
            except Exception as error:
                report = RuntimeError(f"rank 0: {error!r}")
                dist.broadcast_object_list([report], src=0, group=self.group)  # the others must not wait
                raise
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        if self.world_size == 1:
            return torch.tensor(values, dtype=torch.float64).tolist()
        on_cpu = "cpu:" in dist.get_backend_config(self.group)  # such as "cpu:gloo,cuda:nccl"; NCCL's has no CPU
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if on_cpu else self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, value: Result) -> list[Result]:
        """The `value` of every rank, in the order of ranks, on all ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def all_true(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank."""
        return self.sum([0.0 if flag else 1.0])[0] == 0.0


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks met: a store that all of them can read and write."""

    store: dist.Store
    store_rank: int | None  # the rank whose process holds it; None: the launcher does


def read_runtime() -> Runtime:
    """This process's place as the launcher tells it; a process on its own without one. Raises ConfigError."""
    for rank, local_rank, world_size, local_world_size in LAUNCHER_VARIABLES:
        if rank in os.environ and world_size in os.environ:
            world = read_integer(world_size)
            local = next((read_integer(name) for name in local_world_size if os.environ.get(name)), world)
            return Runtime(read_integer(rank), read_integer(local_rank), world, local)
    return Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)


def read_integer(name: str) -> int:
    value = os.environ.get(name, "")
    number = re.match(r"\d+(?=$|[(,])", value)  # Slurm writes 2(x3),1 for two tasks on each of three nodes, then one
    if number is None:
        raise ConfigError(
            f"the launcher's environment variable {name}={value!r} is not a number; start ranks with the deepspeed "
            "launcher, torchrun or srun"
        )
    return int(number.group())


def launch_command() -> str | None:
    """How launch.deepspeed was called, on whatever machine; None if it has not started this rank."""
    return os.environ.get(LAUNCH_COMMAND)


def slurm_job() -> dict[str, str | int]:
    """The Slurm job that this process belongs to and how often it was requeued; nothing outside one."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {"job": os.environ["SLURM_JOB_ID"], "requeues": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def export_rendezvous(runtime: Runtime) -> None:
    """Set what `torch.distributed` and DeepSpeed read from the environment, where the launcher has not."""
    for name, value in (
        ("RANK", runtime.rank),
        ("LOCAL_RANK", runtime.local_rank),
        ("WORLD_SIZE", runtime.world_size),
    ):
        os.environ.setdefault(name, str(value))
    if runtime.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ConfigError(
            f"{runtime.world_size} ranks need MASTER_ADDR and MASTER_PORT (the first host and a free port on it); "
            "the deepspeed launcher and torchrun set them, under srun export them in the batch script"
        )


def gpu_is_usable() -> bool:
    """Whether there is a GPU, and the environment does not forbid it."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def connect_ranks(runtime: Runtime) -> dist.Store:
    """The process group of all ranks, through the store that is returned.

    Raises RendezvousError where they cannot meet, ConfigError where they would share a GPU.
    """
    export_rendezvous(runtime)
    # A sum that hides behind other work must not wait for that work's kernels to leave room.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        raise RendezvousError(
            f"the ranks could not meet at MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT="
            f"{os.environ['MASTER_PORT']}: {reason}; name the first host and a free port on it (the launchers have "
            "--master_addr and --master_port)"
        ) from error
    dist.init_process_group(runtime.backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    require_own_gpus(runtime)
    return store


def require_own_gpus(runtime: Runtime) -> None:
    """Raises ConfigError, on all ranks, where two of them have the same GPU; NCCL says so later and less clearly."""
    if runtime.device.type != "cuda" or runtime.world_size == 1:
        return
    properties = torch.cuda.get_device_properties(runtime.device)
    own = (socket.gethostname(), str(properties.uuid))
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in enumerate(runtime.gather(own)):
        holders.setdefault(gpu, []).append(rank)
    for (host, _), ranks in holders.items():
        if len(ranks) > 1:
            raise ConfigError(
                f"ranks {', '.join(map(str, ranks))} on {host} would share one GPU; start as many ranks per machine as "
                "it has GPUs"
            )


def another_rank_ended(error: Exception) -> bool:
    """Whether a collective failed because a rank is gone, whose own message says why."""
    return any(words in str(error) for words in PEER_LOST)


def launcher_holds_store() -> bool:
    """Whether the store through which the ranks meet is torchrun's rather than rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
