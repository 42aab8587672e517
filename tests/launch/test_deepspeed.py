"""The plans of `launch.deepspeed`, and user errors before anything starts."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from helpers import run_here, user_error

from launch.deepspeed import make_plans, parse


def test_user_errors(tmp_path: Path) -> None:
    missing = run_here("launch.deepspeed", "--hostfile", str(tmp_path / "hosts"), "kraken_train.train", "run_dir=/r")
    assert "hosts does not exist; name a file" in user_error(missing)
    assert "give --hostfile" in user_error(run_here("launch.deepspeed", "--num_nodes", "2", "kraken_train.train"))


def test_two_launches_on_one_machine_do_not_share_a_port() -> None:
    """DeepSpeed's own default is the same port for every launch."""

    def port() -> int:
        plans, _ = make_plans(*parse(["--num_gpus=1", "kraken_train.train", "run_dir=/nowhere"]))
        return plans["localhost"].master_port

    with socket.create_server(("", port())) as first:
        assert port() != first.getsockname()[1]


def test_all_unusable_hosts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a script in place of ssh that knows three hosts: one refuses, one lacks the folder, one works."""
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
