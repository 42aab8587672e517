"""Python on the hosts of a launch: the ssh command, and the check that every host can start ranks."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kraken_train.common.errors import ConfigError
from launch.hosts import is_local

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=15")
SSH_FAILED = 255  # the exit code of ssh when the connection fails
CHECK_TIMEOUT = 60.0  # seconds; starting Python from a slow disk is included
# The check runs this program on a host. It prints a free port and the addresses of the host.
CHECK_MARKER = "the port and the addresses:"
CHECK_PROGRAM = (
    "import socket, subprocess, launch.node; s = socket.socket(); s.bind(('', 0)); "
    f"print('{CHECK_MARKER}', s.getsockname()[1]); "
    "print(subprocess.run(['hostname', '-I'], capture_output=True, text=True).stdout)"
)


def python_path() -> str:
    """PYTHONPATH for a host: the current folder, then PYTHONPATH as it is here."""
    return os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))


def python_command(host: str, ssh: list[str], *arguments: str) -> list[str]:
    """The command that runs this Python on a host, in the current folder; through `ssh` if it is another machine."""
    if is_local(host):
        return [sys.executable, *arguments]
    python = shlex.join(["env", f"PYTHONPATH={python_path()}", sys.executable, *arguments])
    return [*ssh, host, f"cd {shlex.quote(str(Path.cwd()))} && exec {python}"]


@dataclass(frozen=True)
class HostCheck:
    """The result of CHECK_PROGRAM on a host."""

    problem: str | None = None  # why it cannot start ranks; None if it can
    port: int = 0
    addresses: list[str] = field(default_factory=list)


def check_hosts(hosts: list[str], ssh: list[str]) -> tuple[int, list[str]]:
    """Check all hosts at the same time; a free port and the addresses of the first host.

    Raises ConfigError that names every host that cannot start ranks.
    """
    with ThreadPoolExecutor(max_workers=64) as pool:
        checks = list(pool.map(lambda host: check_host(host, ssh), hosts))
    if problems := [check.problem for check in checks if check.problem is not None]:
        raise ConfigError("; ".join(problems))
    return checks[0].port, checks[0].addresses


def check_host(host: str, ssh: list[str]) -> HostCheck:
    try:
        result = subprocess.run(
            python_command(host, ssh, "-c", CHECK_PROGRAM),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=CHECK_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        return HostCheck("ssh is not installed on this machine; install the OpenSSH client")
    except subprocess.TimeoutExpired:
        return HostCheck(f"host {host} does not answer within {CHECK_TIMEOUT:.0f} s; repair it, or --exclude it")
    if result.returncode == 0:
        # The shell of the host may print something before the marker.
        port, *addresses = result.stdout.rpartition(CHECK_MARKER)[2].split()
        return HostCheck(port=int(port), addresses=addresses)
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    if is_local(host) or result.returncode != SSH_FAILED:
        return HostCheck(
            f"host {host} cannot start ranks: {reason}; it needs {Path.cwd()} and {sys.executable}, as on this machine"
        )
    return HostCheck(f"host {host} cannot be reached by ssh: {reason}; `ssh {host} true` must work without a password")
