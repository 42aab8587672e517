"""`launch.node`: what its ranks receive, and how they end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import REPOSITORY, wait_until
from node_program import EXITS_ON_SIGTERM, RunningLauncher, make_plan, require_ended, write_program

from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from launch import node as node_module
from launch.exit_report import ErrorLines, diagnose
from launch.node import CONNECTION_TIMEOUT, KEEP_ALIVE, KILL, STOP, Node
from launch.plan import Plan

# Arguments that shells, pdsh and Hydra would each change.
DIFFICULT_ARGUMENTS = [
    'run_dir=/tmp/a run\'s "folder"',
    "data_dir={data/web: 0.7, data/books: 0.3}",
    "x=$HOME",
    "x=(a b) ; c & d | e > f",
    "x=back\\slash `id` *",
    "--cfg",
    "tracking.notes=first line\nsecond line",
    "",
]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningLauncher]]:
    """`start(plan, on_sigterm)` starts `launch.node` with ranks of PROGRAM."""
    nodes = []

    def start(plan: Plan, on_sigterm: str = EXITS_ON_SIGTERM) -> RunningLauncher:
        folder = tmp_path / str(len(nodes))
        folder.mkdir()
        write_program(tmp_path, on_sigterm)
        plan.environment["OUT"] = str(folder)
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "launch.node"], stdin=subprocess.PIPE, stderr=errors, cwd=REPOSITORY
            )
        nodes.append(process)
        node = RunningLauncher(folder, process)
        node.send(plan.to_line())
        return node

    yield start
    for process in nodes:
        process.kill()
        process.wait()


def test_arguments_environment_and_stop(tmp_path: Path, start: Callable[..., RunningLauncher]) -> None:
    """Ranks get the arguments unchanged; STOP ends them. The plan reaches another host in the same way, as JSON."""
    plan = make_plan(tmp_path, *DIFFICULT_ARGUMENTS)
    node = start(plan)
    ranks = node.ranks()
    for number, rank in enumerate(ranks):
        assert rank["arguments"] == DIFFICULT_ARGUMENTS
        assert rank["environment"] == {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(plan.master_port),
            "X": "a 'b' $c",
        }
    node.send(STOP)
    assert node.process.wait() == INTERRUPTED_EXIT_CODE, node.errors()
    require_ended(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "on_sigterm", "code"), [(b"", EXITS_ON_SIGTERM, INTERRUPTED_EXIT_CODE), (KILL, "None", 1)]
)
def test_lost_connection_and_kill(
    tmp_path: Path, start: Callable[..., RunningLauncher], message: bytes, on_sigterm: str, code: int
) -> None:
    """The end of the input stops the ranks, and KILL ends ranks that ignore SIGTERM. 5 seconds each."""
    node = start(make_plan(tmp_path), on_sigterm)
    ranks = node.ranks()
    node.send(message)
    if not message:
        assert node.process.stdin is not None
        node.process.stdin.close()
    assert node.process.wait() == code, node.errors()
    require_ended(ranks)


def test_a_killed_rank_is_named(tmp_path: Path, start: Callable[..., RunningLauncher]) -> None:
    """A rank that SIGKILL ends cannot report that, so the node prints it and records it in the run's folder."""
    errors_folder = tmp_path / "run" / "starts" / "0003" / "errors"
    errors_folder.mkdir(parents=True)
    plan = make_plan(tmp_path, run_dir=str(tmp_path / "run"), earlier_starts=2)
    node = start(plan)
    ranks = node.ranks()
    wait_until(lambda: all(node.has_pidfd(rank["pid"]) for rank in ranks))
    (node.folder / "1.die").touch()
    message = f"error: rank 1 (process {ranks[1]['pid']} on {socket.gethostname()}): was killed by SIGKILL"
    assert node.process.wait() == 1
    assert message in node.errors()
    require_ended(ranks)
    report = diagnose(plan, {"localhost": 1}, ErrorLines(), stop_requested=False)
    assert report.messages == [message]
    assert report.exit_code == 1


def test_a_launcher_that_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are stopped after CONNECTION_TIMEOUT, as when the launcher's machine has lost its power."""
    now = 1000.0
    monkeypatch.setattr(node_module, "time", SimpleNamespace(monotonic=lambda: now))
    node = Node(make_plan(tmp_path))
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        now += CONNECTION_TIMEOUT
        node.read_input()
        assert node.stop_reason is None
        os.write(writing, KEEP_ALIVE)
        node.read_input()
        now += CONNECTION_TIMEOUT
        node.read_input()
        assert node.stop_reason is None
        now += 1.0
        node.read_input()
        assert node.stop_reason is not None
        assert not node.connected
    os.close(writing)
