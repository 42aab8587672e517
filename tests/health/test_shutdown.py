"""What asks a run to end: SIGTERM and its launchers, which are told from shells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from kraken_train.health import shutdown
from kraken_train.health.shutdown import STARTED_BY_NODE, STOP_SIGNALS, Launchers, StopRequest, has_ended, launcher_name


@pytest.fixture
def restored_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored_handlers")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_inside_the_context_only(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest().on_signals():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before, "as nothing has asked, it means what it did"
    stop = StopRequest()
    with stop.on_signals():
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == number.name


@pytest.mark.usefixtures("restored_handlers")
def test_several_signals_are_one_request() -> None:
    """As Slurm sends them at a preemption. What comes once the context has ended must not cut off the process's end."""
    stop = StopRequest()
    with stop.on_signals():
        for number in (signal.SIGUSR1, signal.SIGCONT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.reason == "SIGUSR1"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.reason == "SIGUSR1"


def test_the_first_reason_is_kept() -> None:
    stop = StopRequest()
    thread = threading.Thread(target=stop.request, args=("its launcher has ended",))
    thread.start()
    thread.join()
    stop.request("SIGTERM")
    assert stop.reason == "its launcher has ended"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python3 /opt/bin/deepspeed --num_gpus 2 --module a.b", "deepspeed"),
        ("/opt/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=x a.py", "deepspeed.launcher.launch"),
        ("python -W ignore -m torch.distributed.run -m a.b", "torch.distributed.run"),
        ("python /opt/bin/torchrun --nproc-per-node 2 -m a.b", "torchrun"),
        ("python -u -X started_by=launch.node -m deepspeed.launcher.launch a.py", "deepspeed.launcher.launch"),
        ("python -m launch.deepspeed --num_gpus 2 a.b", "launch.deepspeed"),
        ("bash -c deepspeed", None),
        ("timeout 100 deepspeed --num_gpus 2", None),
        ("python submit.py deepspeed", None),
        ("python -m kraken_train.train", None),
        ("python", None),
        ("", None),
    ],
)
def test_launchers_are_recognised(command: str, name: str | None) -> None:
    assert launcher_name(command.split()) == name


RUNNER, LOCAL = ["python", "/opt/bin/deepspeed"], ["python", "-u", "-m", "deepspeed.launcher.launch"]
NODE, OURS = ["python", "-u", "-m", "launch.node"], ["python", "-m", "launch.deepspeed"]
OF_A_NODE = ["python", "-u", "-X", STARTED_BY_NODE, *LOCAL[2:], "--node_rank=1"]
SHELL, DAEMON, INIT = ["bash"], ["sshd"], ["init"]


@pytest.mark.parametrize(
    ("ancestors", "watched", "orphaned"),
    [
        ([SHELL], 0, False),
        ([SHELL, RUNNER], 0, False),
        ([["python", "/opt/bin/torchrun"], SHELL], 1, False),
        ([LOCAL, RUNNER, SHELL], 2, False),
        ([LOCAL, INIT], 1, True),
        ([LOCAL], 1, True),
        ([[*LOCAL, "--node_rank=1"], SHELL], 1, False),
        ([[*LOCAL, "--node_rank=1"], SHELL, DAEMON, DAEMON], 3, False),
        ([[*LOCAL, "--node_rank=1"], DAEMON, INIT], 2, False),
        ([[*LOCAL, "--node_rank=1"], ["slurmstepd"], DAEMON], 1, False),
        ([OF_A_NODE, NODE, OURS, SHELL], 3, False),
        ([OF_A_NODE, NODE, SHELL, DAEMON], 2, False),
        ([OF_A_NODE, INIT], 1, True),
    ],
)
def test_ancestors(monkeypatch: pytest.MonkeyPatch, ancestors: list[list[str]], watched: int, orphaned: bool) -> None:
    """From the parent upwards. A local launcher has lost its runner, unless it was never to have one."""
    monkeypatch.setattr(shutdown.psutil, "Process", lambda: -1)
    monkeypatch.setattr(shutdown, "parent_of", lambda process: process + 1 if process + 1 < len(ancestors) else None)
    monkeypatch.setattr(shutdown, "command_of", lambda process: ancestors[process])
    monkeypatch.setattr(shutdown, "name_of", lambda process: ancestors[process][0])
    monkeypatch.setattr(shutdown, "has_ended", lambda process: False)
    launchers = Launchers()
    assert len(launchers.processes) == watched
    assert bool(launchers) == bool(watched)
    assert launchers.have_ended() == orphaned


def test_a_process_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    assert not has_ended(process)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(process), "dead, and not yet collected"
    child.communicate()
    assert has_ended(process)
