"""The processes of a run: the rank of this one, and collectives over all of them for small values.

Reads the launcher's environment once (deepspeed and torchrun set RANK and friends, Slurm SLURM_PROCID and friends);
nothing else in the package does, but for the address where the ranks meet (`kraken_train.parallel.rendezvous`).
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from kraken_train.common.errors import ConfigError, KrakenError, TrainingError
from kraken_train.common.lost_peer import tells_of_lost_peer

Result = TypeVar("Result")

# What torchrun and deepspeed set for each rank, by the fields of Runtime. Some have two names for the last.
LAUNCHER_VARIABLES = {
    "rank": ("RANK",),
    "local_rank": ("LOCAL_RANK",),
    "world_size": ("WORLD_SIZE",),
    "local_world_size": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
}
PORTS = range(15000, 32768)  # that free_port chooses from
# Set by srun for each task; the variables of the job itself are also there in a batch script, which is no task.
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")


@dataclass(frozen=True)
class Runtime:
    """This process among the `world_size` processes of the run.

    `dataclasses.replace(runtime, group=...)` is the same processes with another process group for collectives, for
    example one that a second thread can use while the first trains.
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
        """NCCL for tensors on GPUs, gloo for those on the CPU, as small values are."""
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


def read_runtime() -> Runtime:
    """This process's rank from the launcher's variables; without a launcher it is a single process.

    Raises ConfigError where the variables of a launcher contradict each other or some are missing, as in a container
    that has set some of them: otherwise a rank could wait for others that nobody starts.
    """
    given = {name: read_integer(name) for names in LAUNCHER_VARIABLES.values() for name in names if is_set(name)}
    if "RANK" in given:
        runtime = runtime_of_launcher(given)
    elif is_set(SRUN_VARIABLES[0]) and is_set(SRUN_VARIABLES[2]):
        rank, local_rank, world, local_world = map(read_integer, SRUN_VARIABLES)
        runtime = Runtime(rank, local_rank, world, local_world)
        for name in LAUNCHER_VARIABLES["local_world_size"]:
            given.pop(name, None)  # it can differ between machines, and Slurm's list begins with that of the first
    else:
        runtime = Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)
    for field, names in LAUNCHER_VARIABLES.items():
        for name in names:
            expected = getattr(runtime, field)
            if given.get(name, expected) != expected:
                raise contradiction(given, f"this process is {describe(runtime)}, so {name} must be {expected}")
    return runtime


def runtime_of_launcher(given: dict[str, int]) -> Runtime:
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE") if name not in given]
    if missing:
        raise contradiction(given, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    rank, local_rank, world = given["RANK"], given["LOCAL_RANK"], given["WORLD_SIZE"]
    local_world = next((given[name] for name in LAUNCHER_VARIABLES["local_world_size"] if name in given), world)
    for name, number, limit_name, limit in (
        ("RANK", rank, "WORLD_SIZE", world),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world),
    ):
        if number >= limit:
            raise contradiction(given, f"{name} must be less than {limit_name}")
    if local_world > world:
        raise contradiction(given, "LOCAL_WORLD_SIZE must not be more than WORLD_SIZE")
    return Runtime(rank, local_rank, world, local_world)


def is_set(name: str) -> bool:
    return bool(os.environ.get(name))


def describe(runtime: Runtime) -> str:
    return "alone" if runtime.world_size == 1 else f"rank {runtime.rank} of {runtime.world_size}"


def contradiction(given: dict[str, int], rule: str) -> ConfigError:
    values = " ".join(f"{name}={value}" for name, value in given.items())
    return ConfigError(
        f"the environment has {values} of a launcher, but {rule}; start ranks with launch.deepspeed, torchrun or srun, "
        f"or unset these variables for a process alone: unset {' '.join(given)}"
    )


def read_integer(name: str) -> int:
    value = os.environ.get(name, "")
    number = re.match(r"\d+(?=$|[(,])", value)  # Slurm writes 2(x3),1 for two tasks on each of three nodes, then one
    if number is None:
        raise ConfigError(
            f"the launcher's environment variable {name}={value!r} is not a number from 0 on; start ranks with "
            f"launch.deepspeed, torchrun or srun, or for a process alone: unset {name}"
        )
    return int(number.group())


def slurm_job() -> dict[str, str | int]:
    """The Slurm job that this process belongs to and how often it was requeued; nothing outside one."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {"job": os.environ["SLURM_JOB_ID"], "requeues": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def gpu_is_usable() -> bool:
    """Whether there is a GPU and the environment permits its use (DS_ACCELERATOR is not cpu)."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def another_rank_ended(error: Exception) -> bool:
    """Whether a collective failed because another rank has ended; that rank's own message has the cause."""
    return tells_of_lost_peer(str(error))


def free_port() -> int:
    """A port that is free on all addresses of this host, at random.

    It is below those that Linux gives out by itself (net.ipv4.ip_local_port_range), so that no other program gets it
    before it is used.
    """
    for _ in range(1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", secrets.choice(PORTS)))
            return int(probe.getsockname()[1])
    raise TrainingError(f"none of 1000 ports from {PORTS.start} to {PORTS.stop - 1} is free on this host")
