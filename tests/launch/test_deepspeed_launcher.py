"""The launcher around DeepSpeed's: which hosts, what they are told, how it ends, and what it says last."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers import REPOSITORY, run_here, user_error, wait_until

from kraken_train.common.errors import ConfigError
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.parallel.ranks import free_port
from kraken_train.run.rank_errors import RankError, record_error
from launch import node as node_module
from launch.deepspeed import make_plans, parse
from launch.exit_report import Words, judge
from launch.hosts import Slots, choose, read_hostfile
from launch.node import KILL, STOP, Plan

# What shells, pdsh and Hydra would each read in another way.
AWKWARD = [
    'run_dir=/tmp/a run\'s "folder"',
    "data_dir={data/web: 0.7, data/books: 0.3}",
    "x=$HOME",
    "x=(a b) ; c & d | e > f",
    "x=back\\slash `id` *",
    "--cfg",
    "tracking.notes=first line\nsecond line",
    "",
]


def plan(tmp_path: Path, *arguments: str, module: str = "waits", **changes: object) -> Plan:
    settings: dict[str, object] = {
        "node_rank": 0,
        "hosts": {"localhost": ["0", "1"]},
        "master_addr": "127.0.0.1",
        "master_port": free_port(),
        "launcher_options": ["--log_level=critical"],
        "module": module,
        "arguments": list(arguments),
        "environment": {"DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}", "X": "a 'b' $c"},
        "run_dir": None,
        "earlier_starts": 0,
    }
    return Plan(**(settings | changes))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------
# Hosts
# ----------------------------------------------------------------------------------------------------------------


def test_a_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nnode-1 slots=2\n\n  node-2   slots=4  # the new one\n")
    hosts = {"node-1": ["0", "1"], "node-2": ["0", "1", "2", "3"]}
    assert read_hostfile(file) == hosts
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_hostfile(file) == hosts, "as an editor on Windows saves it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1\n", r"hosts:1: 'node-1' must be a host and its GPUs"),
        ("node-1 slots=two\n", "hosts:1: .* must be a host"),
        ("a slots=1\nb slots=1\na slots=2\n", "hosts:3: a is there twice"),
        ("localhost slots=1\n127.0.0.1 slots=1\n", "hosts:2: 127.0.0.1 is there twice, as localhost"),
        ("a slots=1000000000\n", "hosts:1: .* must be a host"),
        ("a slots=0\n", "hosts:1: a has slots=0"),
        ("# nothing\n", "names no host"),
        (None, "hosts does not exist; name a file"),
    ],
)
def test_wrong_hostfiles(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(file)


HOSTS: Slots = {"a": ["0", "1"], "b": ["0", "1", "2"]}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (("", "", None, None), HOSTS),
        (("", "", 1, None), {"a": ["0", "1"]}),
        (("", "", None, 1), {"a": ["0"], "b": ["0"]}),
        (("b:0,2", "", None, None), {"b": ["0", "2"]}),
        (("b@a:1", "", None, None), {"a": ["1"], "b": ["0", "1", "2"]}),
        (("", "a@b:1", None, None), {"b": ["0", "2"]}),
    ],
)
def test_a_choice_of_hosts(options: tuple[str, str, int | None, int | None], chosen: Slots) -> None:
    assert choose(HOSTS, *options) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("", "", 3, None), "--num_nodes 3 is more than the 2 hosts that there are [(]a, b[)]"),
        (("", "", None, 3), "--num_gpus 3 is more than a has [(]slots=2[)]"),
        (("", "", None, 0), "--num_gpus 0 must be at least 1"),
        (("c", "", None, None), "there is no host 'c', but a, b"),
        (("a:7", "", None, None), "a has no slot '7', but 0, 1"),
        (("", "a@b", None, None), "leaves no slot"),
        (("a", "", 1, None), "use one"),
    ],
)
def test_wrong_choices(options: tuple[str, str, int | None, int | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(HOSTS, *options)


# ----------------------------------------------------------------------------------------------------------------
# Messages before anything starts
# ----------------------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_message(tmp_path: Path) -> None:
    missing = run_here("launch.deepspeed", "--hostfile", str(tmp_path / "hosts"), "kraken_train.train", "run_dir=/r")
    assert "hosts does not exist; name a file" in user_error(missing)
    assert "give --hostfile" in user_error(run_here("launch.deepspeed", "--num_nodes", "2", "kraken_train.train"))


def test_two_launches_on_one_machine_do_not_share_a_port() -> None:
    """DeepSpeed's own default is one port for all."""

    def port() -> int:
        plans, _ = make_plans(*parse(["--num_gpus=1", "kraken_train.train", "run_dir=/nowhere"]))
        return plans["localhost"].master_port

    with socket.create_server(("", port())) as first:
        assert port() != first.getsockname()[1]


def test_dead_hosts_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an ssh that knows three hosts: one is dead, one lacks the folder, one is well."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        "#!/bin/sh\ncase $* in *node-dead*) echo 'ssh: connect to host node-dead: Connection refused' >&2; exit 255;;\n"
        "*node-bare*) echo 'cd: /here: No such file or directory' >&2; exit 1;;\n*) echo 12345; echo 10.0.0.7;; esac\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    hosts = tmp_path / "hosts"
    hosts.write_text("node-well slots=1\nnode-dead slots=1\nnode-bare slots=1\n")
    message = user_error(run_here("launch.deepspeed", "-H", str(hosts), "kraken_train.train", f"run_dir={tmp_path}/r"))
    assert "host node-dead cannot be reached by ssh: ssh: connect to host node-dead: Connection refused" in message
    assert "host node-bare cannot start ranks: cd: /here: No such file or directory" in message
    assert "node-well" not in message
    assert not (tmp_path / "r").exists()


# ----------------------------------------------------------------------------------------------------------------
# A machine's part, with small programs in place of training
# ----------------------------------------------------------------------------------------------------------------


# A rank that tells its arguments and then waits for signals.
PROGRAM = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: {on_sigterm})
folder, rank = pathlib.Path(os.environ["OUT"]), os.environ["RANK"]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "X")
found = [os.getpid(), sys.argv[1:], {{name: os.environ[name] for name in names}}]
(folder / f".{{rank}}").write_text(json.dumps(found))
(folder / f".{{rank}}").rename(folder / rank)
while True:
    time.sleep(0.1)
    if (folder / f"{{rank}}.die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass
class Started:
    """A node whose two ranks run PROGRAM."""

    folder: Path
    process: subprocess.Popen[bytes]

    def tell(self, message: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message)
        self.process.stdin.flush()

    def found(self) -> list[Any]:
        """What the ranks have told, once both have."""
        files = [self.folder / rank for rank in "01"]
        wait_until(lambda: self.process.poll() is not None or all(file.exists() for file in files), self.errors)
        assert self.process.poll() is None, self.errors()
        return [json.loads(file.read_text()) for file in files]

    def watches(self, pid: int) -> bool:
        """Whether it has a descriptor of that process, which tells it at once when that ends."""
        told = []
        for file in Path(f"/proc/{self.process.pid}/fdinfo").iterdir():
            with suppress(OSError):  # closed just now
                told.append(file.read_text())
        return any(f"\nPid:\t{pid}\n" in text for text in told)

    def errors(self) -> str:
        return (self.folder / "errors").read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """`start(plan, on_sigterm)`: a rank dies when OUT has the file `RANK.die`."""
    nodes = []

    def start(told: Plan, on_sigterm: str) -> Started:
        folder = tmp_path / str(len(nodes))
        folder.mkdir()
        (tmp_path / "waits.py").write_text(PROGRAM.format(on_sigterm=on_sigterm))
        told.environment["OUT"] = str(folder)
        with (folder / "errors").open("w") as errors:
            node = subprocess.Popen(
                [sys.executable, "-u", "-m", "launch.node"], stdin=subprocess.PIPE, stderr=errors, cwd=REPOSITORY
            )
        nodes.append(node)
        started = Started(folder, node)
        started.tell(told.to_line())
        return started

    yield start
    for node in nodes:
        node.kill()
        node.wait()


def require_ended(ranks: list[Any]) -> None:
    for pid, *_ in ranks:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_node_passes_on_what_it_is_told(tmp_path: Path, start: Callable[..., Started]) -> None:
    """Arguments as they are, on another host too, as a line of JSON is what travels there; and the request to end."""
    told = plan(tmp_path, *AWKWARD)
    node = start(told, "sys.exit(143)")
    ranks = node.found()
    for rank, (_, arguments, environment) in enumerate(ranks):
        assert arguments == AWKWARD
        assert environment == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(told.master_port),
            "X": "a 'b' $c",
        }
    node.tell(STOP)
    assert node.process.wait() == INTERRUPTED_EXIT_CODE, node.errors()
    require_ended(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("message", "on_sigterm", "code"), [(b"", "sys.exit(143)", 143), (KILL, "None", 1)])
def test_a_node_ends_its_ranks(
    tmp_path: Path, start: Callable[..., Started], message: bytes, on_sigterm: str, code: int
) -> None:
    """When its connection ends, and at once when it must. 5 seconds each."""
    node = start(plan(tmp_path), on_sigterm)
    ranks = node.found()
    node.tell(message)
    if not message:
        assert node.process.stdin is not None
        node.process.stdin.close()
    assert node.process.wait() == code, node.errors()
    require_ended(ranks)


def test_several_signals_are_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the whole job, as Slurm sends them at a preemption: the ranks save and end, and the exit code says so."""
    told = plan(tmp_path)
    (tmp_path / "waits.py").write_text(PROGRAM.format(on_sigterm="sys.exit(143)", dies=False))
    for name, value in {**told.environment, "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "errors").open("w") as errors:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "launch.deepspeed", "--num_gpus=2", "waits"], stderr=errors, cwd=REPOSITORY
        )
    try:
        ranks = Started(tmp_path, launcher).found()
        others = [process for process in psutil.Process(launcher.pid).children(recursive=True)
                  if process.pid not in [pid for pid, *_ in ranks]]  # fmt: skip
        for number in (signal.SIGUSR1, signal.SIGCONT):
            for process in (psutil.Process(launcher.pid), *others):
                process.send_signal(number)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == INTERRUPTED_EXIT_CODE, (tmp_path / "errors").read_text()
    finally:
        launcher.kill()
    assert "error" not in (tmp_path / "errors").read_text()
    require_ended(ranks)


def test_a_rank_that_is_killed_is_named(tmp_path: Path, start: Callable[..., Started]) -> None:
    """By its launcher, since it can say nothing; in the run's folder too."""
    errors_folder = tmp_path / "run" / "starts" / "0003" / "errors"
    errors_folder.mkdir(parents=True)
    told = plan(tmp_path, run_dir=str(tmp_path / "run"), earlier_starts=2)
    node = start(told, "sys.exit(143)")
    ranks = node.found()
    wait_until(lambda: all(node.watches(pid) for pid, *_ in ranks))
    (node.folder / "1.die").touch()
    words_of_node = f"error: rank 1 (process {ranks[1][0]} on {socket.gethostname()}): was killed by SIGKILL"
    assert node.process.wait() == 1
    assert words_of_node in node.errors()
    require_ended(ranks)
    verdict = judge(told, {"localhost": 1}, Words(), asked=False)
    assert verdict.messages == [words_of_node]
    assert verdict.exit_code == 1


# ----------------------------------------------------------------------------------------------------------------
# The last words
# ----------------------------------------------------------------------------------------------------------------


def rank_error(rank: int, message: str, follows: bool = False, restart_helps: bool = False) -> RankError:
    return RankError(f"2026-01-01T00:00:0{rank}", rank, "n1", 10 + rank, message, None, follows, restart_helps)


def words(*lines: str) -> Words:
    heard = Words()
    for line in lines:
        heard.hear(line)
    return heard


def test_the_root_cause_is_the_last_word(tmp_path: Path) -> None:
    told = plan(tmp_path, run_dir=str(tmp_path), earlier_starts=1)
    for number in (1, 2):
        (tmp_path / "starts" / f"000{number}" / "errors").mkdir(parents=True)
    record_error(tmp_path / "starts" / "0001", rank_error(0, "of an earlier start"))
    start = tmp_path / "starts" / "0002"
    follower = "another rank has ended, see its message; the same command continues"
    record_error(start, rank_error(0, follower, follows=True, restart_helps=True))
    assert judge(told, {"n1": 1}, words(f"error: {follower}"), False).messages == [
        "error: the ranks have ended on n1 with exit code 1"
    ]
    record_error(start, rank_error(3, "the disk is full"))
    verdict = judge(told, {"n1": 1, "n2": 1}, words(f"error: {follower}"), asked=False)
    assert (verdict.exit_code, verdict.messages) == (2, ["error: rank 3 (process 13 on n1): the disk is full"])


def test_the_watchdogs_word_comes_before_a_kill(tmp_path: Path) -> None:
    """It kills a rank that hangs, so that the signal is not the cause."""
    (tmp_path / "starts" / "0001" / "errors").mkdir(parents=True)
    record_error(tmp_path / "starts" / "0001", rank_error(1, "was killed by SIGKILL", restart_helps=True))
    line = "error: rank 1 (process 11 on n1) has not answered for 45 s; the job is ended"
    verdict = judge(plan(tmp_path, run_dir=str(tmp_path)), {"n1": 1}, words(line), asked=False)
    assert (verdict.exit_code, verdict.messages) == (1, [line])


@pytest.mark.parametrize(
    ("codes", "lines", "asked", "code", "messages"),
    [
        ({"a": 0, "b": 0}, ["error: of old"], False, 0, []),
        ({"a": 143, "b": 143}, [], False, 143, []),
        ({"a": 1, "b": 0}, [], True, 143, []),
        ({"a": 2}, ["error: seed=-1 must be", "error: [rank 1] seed=-1"], False, 2, ["error: seed=-1 must be"]),
        ({"a": 1}, ["Traceback (most", "ImportError: no module"], False, 1, ["ImportError: no module"]),
        ({"a": 0, "b": 1}, [], False, 1, ["error: the ranks have ended on b with exit code 1"]),
    ],
)
def test_exit_codes(
    tmp_path: Path, codes: dict[str, int], lines: list[str], asked: bool, code: int, messages: list[str]
) -> None:
    verdict = judge(plan(tmp_path), codes, words(*lines), asked)
    assert (verdict.exit_code, verdict.messages) == (code, messages)


def test_the_silence_of_a_launcher_ends_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its machine has vanished without closing the connection."""
    now = 1000.0
    monkeypatch.setattr(node_module, "time", SimpleNamespace(monotonic=lambda: now))
    told = node_module.Node(plan(tmp_path))
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        now += node_module.SILENCE_SECONDS
        told.listen()
        assert told.asked is None
        os.write(writing, node_module.STILL_HERE)
        told.listen()
        now += node_module.SILENCE_SECONDS
        told.listen()
        assert told.asked is None
        now += 1.0
        told.listen()
        assert told.asked is not None and not told.connected
    os.close(writing)
