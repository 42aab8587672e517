"""Training on two hosts under DeepSpeed's launcher: two names of this machine, behind an ssh daemon of our own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import REPOSITORY, wait_until

from integration.training import learned, overrides
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.parallel.ranks import free_port
from kraken_train.run.state import read_state


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options for two names of this machine, behind an ssh daemon of our own."""
    daemon = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(daemon).exists() or shutil.which("ssh") is None:
        pytest.skip("needs sshd (openssh-server) and ssh (openssh-client)")
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "config").write_text(
        f"Host node-a node-b\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
        "Host node-dead\n  HostName 127.0.0.1\n  Port 1\n"
    )
    (folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # it asks for that
    server = subprocess.Popen([daemon, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)
    options = ["--hostfile", str(folder / "hosts"), "--master_addr", "127.0.0.1", f"--launcher_args=-F {folder}/config"]
    login = ["ssh", "-F", str(folder / "config"), "node-a", "true"]
    wait_until(lambda: server.poll() is not None or listens(port))
    if server.poll() is not None or subprocess.run(login, check=False).returncode:
        server.kill()
        pytest.skip("sshd does not let us in on this machine")
    yield options
    server.terminate()
    server.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def started(run: Path, options: list[str], data: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.deepspeed", *options, "kraken_train.train"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command + overrides(data, run, "parallel.sub_layer_parallel_size=2", *more),
        env=environment,
        cwd=run.parent,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def lines(run: Path) -> int:
    """Of metrics."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_steps(run: Path, process: subprocess.Popen[str], more_than: int) -> None:
    wait_until(lambda: process.poll() is not None or lines(run) > more_than)
    assert process.poll() is None, process.communicate()[1]


def left(run: Path) -> list[psutil.Process]:
    """Processes of the run, on whichever host."""
    word = f"run_dir={run}"
    return [process for process in psutil.process_iter(["cmdline"]) if word in (process.info["cmdline"] or [])]


@pytest.mark.slow
def test_two_hosts_over_ssh(two_hosts: list[str], data: Path, tmp_path: Path) -> None:
    """A run; one cut by SIGKILL to its launcher and, continued, by SIGTERM; a dead host. About 2 minutes on 2 cores."""
    whole, cut, alone = tmp_path / "whole run", tmp_path / "cut", tmp_path / "alone"
    process = started(whole, two_hosts, data)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert read_state(whole).state == "finished"
    environment = json.loads((whole / "starts" / "0001" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["launch_command"].startswith("python -m launch.deepspeed --hostfile")

    single = [sys.executable, "-m", "kraken_train.train", *overrides(data, alone)]
    subprocess.run(single, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, stdout=subprocess.DEVNULL)
    for ours, theirs in zip(learned(whole), learned(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)

    process = started(cut, two_hosts, data, "max_steps=100000000", "validation.every=0")
    wait_for_steps(cut, process, 0)
    assert len(left(cut)) >= 4, "a launcher and a rank on each host"
    process.kill()
    process.communicate()
    wait_until(lambda: not left(cut))
    before = lines(cut)
    process = started(cut, two_hosts, data, "max_steps=100000000", "validation.every=0")
    wait_for_steps(cut, process, before)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == INTERRUPTED_EXIT_CODE, errors
    wait_until(lambda: not left(cut))
    assert read_state(cut).state == "interrupted"
    outcomes = [json.loads(line) for line in (cut / "events.jsonl").read_text().splitlines()]
    assert [event["outcome"] for event in outcomes if event["event"] == "ended"] == ["interrupted", "interrupted"]

    hosts = Path(two_hosts[1])
    hosts.with_name("with-dead").write_text(hosts.read_text(encoding="utf-8") + "node-dead slots=1\n")
    options = ["--hostfile", str(hosts.with_name("with-dead")), *two_hosts[2:]]
    process = started(tmp_path / "none", options, data)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "host node-dead cannot be reached by ssh" in errors
    assert not (tmp_path / "none").exists()
