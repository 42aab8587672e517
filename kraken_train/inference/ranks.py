"""The ranks that serve one copy of a model together, without DeepSpeed; one process without a launcher is one rank."""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist

from kraken_train.common.errors import ConfigError, KrakenError
from kraken_train.common.validation import require_positive
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.device import choose_device
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.ranks import Runtime, another_rank_ended, read_runtime
from kraken_train.parallel.rendezvous import connect_ranks
from kraken_train.parallel.symmetric import GPU, Links, SymmetricCommunicator, links_of, open_exchange

Result = TypeVar("Result")
COLLECTIVES = AUTO, LIBRARY, SYMMETRIC = ("auto", "library", "symmetric")
RANK_VARIABLES = {"RANK", "SLURM_PROCID"}  # of torchrun and deepspeed, and of srun


@contextmanager
def started_ranks(device: str = "auto") -> Iterator[Runtime]:
    """This process among the ranks of the run, connected to the others; `device` is one of `DEVICES`.

    References to the process group, such as an engine, must be gone when the context ends: create them in a function.
    Raises ConfigError where the ranks cannot meet or the device does not exist.
    """
    runtime = replace(read_runtime(), use_gpu=choose_device(device).type == "cuda")
    runtime.configure_device()
    if runtime.world_size == 1:
        yield runtime
        return
    connect_ranks(runtime)
    try:
        yield runtime
    except RuntimeError as error:
        if another_rank_ended(error):
            raise KrakenError(f"rank {runtime.rank}: another rank has ended, see its message") from error
        raise
    # Not after an error: the other ranks may never reach this call. A group that is still referenced keeps its threads,
    # and these can abort the interpreter at exit.
    gc.collect()
    dist.destroy_process_group()


def end_rank() -> None:
    """End the process of a rank that has succeeded; returns where there is no launcher.

    Python's own shutdown would destroy the threads of gloo, of which one that still runs aborts the process.
    """
    if not RANK_VARIABLES.isdisjoint(os.environ):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def connect(runtime: Runtime, collectives: str = AUTO) -> Communicator:
    """The communicator of this rank's part of a model, of which all ranks together have one copy.

    `collectives` is one of `COLLECTIVES`. Raises ConfigError where the GPUs cannot do it.
    """
    if runtime.world_size == 1:
        return LocalCommunicator()
    group = runtime.group or dist.group.WORLD
    if group is None:
        raise RuntimeError("the ranks are not connected; use started_ranks")
    links = None if collectives == LIBRARY else find_links(runtime)
    if links is None and collectives == SYMMETRIC:
        raise ConfigError(
            "collectives=symmetric needs 2 to 8 GPUs of one machine that can read each other's memory, each visible to "
            "all ranks; use collectives=auto"
        )
    # Where there is no NVSwitch, reading over PCIe may be slower than NCCL: only if it is asked for.
    if links is None or not (links.multicast or collectives == SYMMETRIC):
        return DistributedCommunicator(group)
    return SymmetricCommunicator(group, open_exchange(group, runtime.device, links))


def find_links(runtime: Runtime) -> Links | None:
    """What connects the GPUs of all ranks, where they can exchange without a library."""
    on_gpu = runtime.device.type == "cuda"
    return links_of(runtime.gather(GPU.of(platform.node(), runtime.device) if on_gpu else None))


def on_all(runtime: Runtime, function: Callable[[], Result]) -> Result:
    """Call `function` on every rank. A KrakenError on one of them is raised on all."""
    result: Result | None = None
    failure: KrakenError | None = None
    try:
        result = function()
    except KrakenError as error:
        failure = error
    for rank, failed in enumerate(runtime.gather(failure)):
        if failed is not None:
            raise type(failed)(f"rank {rank}: {failed}" if runtime.world_size > 1 else str(failed))
    return result  # type: ignore[return-value]


def device_speeds(devices: tuple[float, ...] | None, runtime: Runtime) -> tuple[float, ...]:
    """The relative speed of each rank's device; the setting `devices` may be None where all are equal.

    Raises ConfigError.
    """
    if devices is None:
        return (1.0,) * runtime.world_size
    if not devices:
        raise ConfigError("devices=[] names none; leave it out where all are equal")
    for speed in devices:
        require_positive("devices", speed)
    if len(devices) != runtime.world_size:
        raise ConfigError(
            f"devices={list(devices)} has the speeds of {len(devices)} devices, but there are {runtime.world_size} "
            f"ranks; start {len(devices)} ranks, one on each device, or give {runtime.world_size} speeds"
        )
    return devices
