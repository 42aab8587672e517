"""How the ranks of a run find each other: through a store that rank 0 or the launcher holds at MASTER_ADDR:MASTER_PORT.

`torch.distributed.rendezvous` reports nothing: a rank would wait for the whole time-out without a message about the
ranks that are missing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from kraken_train.common.errors import ConfigError, RendezvousError
from kraken_train.parallel.ranks import Runtime, read_integer

RENDEZVOUS_SECONDS = 600.0  # for all ranks to start
REPORT_SECONDS = 10.0  # after which a waiting rank prints which ranks are missing
LONGEST_PAUSE = 1.0  # seconds between two checks of which ranks have arrived
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the slowest operations that ranks wait for read or write on a slow disk


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks met: a store that all of them can read and write."""

    store: dist.Store
    store_rank: int | None  # the rank whose process holds it; None: the launcher does


def connect_ranks(runtime: Runtime, seconds: float = RENDEZVOUS_SECONDS) -> dist.Store:
    """The process group of all ranks, through the store that is returned.

    Raises RendezvousError where they have not met after `seconds`, ConfigError where they would share a GPU.
    """
    export_ranks(runtime)
    # An all-reduce that overlaps with computation must not wait until kernels of the computation free multiprocessors.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    # A single process needs no address; a stale MASTER_ADDR in the environment is not read.
    store = dist.HashStore() if runtime.world_size == 1 else Meeting(runtime, seconds).store()
    slow = (
        "all ranks have met and connect to each other; if this lasts, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
        "to the network that the machines share"
    )
    with_nccl = runtime.device.type == "cuda" and runtime.world_size > 1
    with reported_if_slow(runtime, slow):
        if with_nccl:
            require_own_gpus(runtime, store)
        dist.init_process_group(
            runtime.backend,
            store=store,
            rank=runtime.rank,
            world_size=runtime.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            # NCCL connects now, on this GPU; otherwise in the first collective, whose error says less.
            device_id=runtime.device if with_nccl else None,
        )
    if with_nccl:
        let_groups_be_made_apart(dist.group.WORLD)
    return store


def export_ranks(runtime: Runtime) -> None:
    """Set the variables that `torch.distributed` and DeepSpeed read; the launcher may use other names."""
    values = {"RANK": runtime.rank, "LOCAL_RANK": runtime.local_rank, "WORLD_SIZE": runtime.world_size}
    os.environ.update({name: str(value) for name, value in values.items()})


class Meeting:
    """Connects this rank to the store and waits there for all other ranks."""

    def __init__(self, runtime: Runtime, seconds: float) -> None:
        self.runtime = runtime
        self.host, self.port = read_address(runtime)
        self.address = f"MASTER_ADDR={self.host} MASTER_PORT={self.port}"
        self.holds_store = runtime.is_first and not launcher_holds_store()
        self.seconds, self.begin = seconds, time.monotonic()
        self.reported = False

    def store(self) -> dist.Store:
        """Raises RendezvousError."""
        try:
            store = self.open_store()
            self.wait_for_ranks(dist.PrefixStore("rendezvous", store))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise self.failure(str(error).splitlines()[0]) from error
        return store

    def open_store(self) -> dist.TCPStore:
        if not self.holds_store:
            self.wait_for_store()
        return dist.TCPStore(
            "127.0.0.1" if self.holds_store else self.host,  # it listens on all addresses of this machine
            self.port,
            self.runtime.world_size,
            is_master=self.holds_store,
            timeout=timedelta(seconds=self.seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def wait_for_store(self) -> None:
        """Try to connect until something answers; when TCPStore itself gives up, it prints a page of C++ frames."""
        holder = "the launcher" if launcher_holds_store() else "rank 0"
        reason = ""

        def answers() -> bool:
            nonlocal reason
            try:
                socket.create_connection((self.host, self.port), timeout=min(5.0, self.seconds)).close()
            except OSError as error:
                reason = error.strerror or str(error)
                return False
            return True

        def missing() -> str:
            return f"{holder} does not answer ({reason})"

        self.wait(answers, missing, is_reporter=lambda: self.runtime.local_rank == 0)

    def wait_for_ranks(self, store: dist.Store) -> None:
        """Until all ranks have connected to the store. Raises RendezvousError."""
        world_size = self.runtime.world_size
        store.set(str(self.runtime.rank), "here")
        if store.add("count", 1) == world_size:
            store.set("all", "here")

        def has_arrived(rank: int) -> bool:
            return store.check([str(rank)])

        def missing() -> str:
            absent = [rank for rank in range(world_size) if not has_arrived(rank)]
            return f"{describe_ranks(absent)} of {world_size} {'has' if len(absent) == 1 else 'have'} not connected"

        def is_first_arrived() -> bool:
            return next(rank for rank in range(world_size) if has_arrived(rank)) == self.runtime.rank

        def all_have_arrived() -> bool:
            if store.check(["ended"]):
                raise RendezvousError(store.get("ended").decode())
            return store.check(["all"])

        try:
            self.wait(all_have_arrived, missing, is_first_arrived)
        except RendezvousError as error:
            if self.holds_store:  # it ends with this process, so the others must have read the reason before
                store.set("ended", str(error))
                time.sleep(2 * LONGEST_PAUSE)
            raise

    def wait(self, done: Callable[[], bool], missing: Callable[[], str], is_reporter: Callable[[], bool]) -> None:
        """Poll `done`. After REPORT_SECONDS print once what is `missing`, if `is_reporter()`; after `seconds` raise."""
        pause = 0.02
        while not done():
            waited = time.monotonic() - self.begin
            if waited > self.seconds:
                raise self.failure(f"{missing()} within {self.seconds:g} s")
            if waited > REPORT_SECONDS and not self.reported:
                self.reported = True
                if is_reporter():
                    print_error(f"rank {self.runtime.rank} waits at {self.address}: {missing()}; it gives up after "
                         f"{self.seconds:g} s")  # fmt: skip
            time.sleep(min(pause, max(self.seconds - waited, 0.01)))
            pause = min(LONGEST_PAUSE, 1.5 * pause)

    def failure(self, reason: str) -> RendezvousError:
        return RendezvousError(
            f"the ranks could not meet at {self.address}: {reason}; see how the others have ended, and name the first "
            "host and a free port on it (the launchers have --master_addr and --master_port)"
        )


def read_address(runtime: Runtime) -> tuple[str, int]:
    """The host and port of the store, from the launcher's variables. Raises ConfigError."""
    host = os.environ.get("MASTER_ADDR")
    if not host or not os.environ.get("MASTER_PORT"):
        raise ConfigError(
            f"{runtime.world_size} ranks need MASTER_ADDR and MASTER_PORT (the first host and a free port on it); "
            "the deepspeed launcher and torchrun set them, under srun export them in the batch script"
        )
    port = read_integer("MASTER_PORT")
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT={port} must be a port: a number from 1 to {2**16 - 1}")
    return host, port


def launcher_holds_store() -> bool:
    """Whether torchrun holds the store rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def describe_ranks(ranks: list[int]) -> str:
    """[1, 2, 3, 7] -> "ranks 1-3, 7"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join('-'.join(map(str, span)) for span in spans)}"


@contextmanager
def reported_if_slow(runtime: Runtime, message: str) -> Iterator[None]:
    """Rank 0 prints `message` if the code in this context takes longer than REPORT_SECONDS."""
    timer = threading.Timer(REPORT_SECONDS, print_error, (message,))
    timer.daemon = True
    if runtime.is_first and runtime.world_size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def let_groups_be_made_apart(world: dist.ProcessGroup | None) -> None:
    """Make further process groups by themselves, not by splitting NCCL's communicator of all ranks.

    A split is a collective of all ranks. Beside gloo it hangs, or is refused by `init_device_mesh`
    (pytorch/pytorch#145376, #159200), and it is what PyTorch does as long as a device is bound to the group.
    """
    assert world is not None
    world.bound_device_id = None


def require_own_gpus(runtime: Runtime, store: dist.Store) -> None:
    """Raises ConfigError, on all ranks, where two of them have the same GPU; NCCL's error is less clear."""
    store = dist.PrefixStore("gpus", store)
    store.set(str(runtime.rank), f"{name_of_gpu(runtime.device)} {socket.gethostname()}")
    gpus = [gpu.decode() for gpu in store.multi_get([str(rank) for rank in range(runtime.world_size)])]
    if store.add("compared", 1) == runtime.world_size:
        store.set("all", "compared")
    if runtime.is_first:
        store.wait(["all"])  # it may hold the store, and ends with an error in a moment
    for gpu in gpus:
        ranks = [rank for rank, other in enumerate(gpus) if other == gpu]
        if len(ranks) > 1:
            raise ConfigError(
                f"ranks {', '.join(map(str, ranks))} on {gpu.split(' ', 1)[1]} would share one GPU; start as many "
                "ranks per machine as it has GPUs"
            )


def name_of_gpu(device: torch.device) -> str:
    """What no other GPU has."""
    return str(torch.cuda.get_device_properties(device).uuid)
