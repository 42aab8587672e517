"""Ranks under DeepSpeed's launcher, on this machine or on the hosts of a hostfile:

    python -m launch.deepspeed [--hostfile FILE] [--num_nodes N] [--num_gpus N] kraken_train.train OVERRIDES...

As `deepspeed --no_local_rank --module`, with the same options, and what that lacks: Hydra's overrides arrive as they
are, hosts are checked before anything starts, SIGTERM, SIGUSR1, SIGINT and SIGHUP let the run save and end, no rank
outlives the launcher on any host, and the last words and the exit code are those of the rank that has failed. Needs
ssh without a password, and on each host the same paths; no pdsh.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from kraken_train.common.cli import user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.health.shutdown import LAUNCHER_SECONDS, STOP_SIGNALS
from kraken_train.run.layout import LAUNCH_COMMAND
from launch.exit_report import Words, judge
from launch.hosts import DEFAULT_HOSTFILE, Slots, choose, is_here, read_hostfile, this_machine
from launch.node import KILL, STILL_HERE, STOP, Plan, describe_end, newest_start_number

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=15")
CHECK_SECONDS = 60.0  # for a host to answer, Python's start on a slow disk included
STILL_HERE_SECONDS = 15.0
PEERS_SECONDS = 60.0  # for the ranks of other hosts to see that one has failed, and end by themselves
# Variables that ranks on other hosts get too. CUDA_VISIBLE_DEVICES is the host's own.
EXPORTED = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW", "LD_LIBRARY_PATH", "DS_", "TORCH", "GLOO", "OMP_", "MKL_", "HF_",
            "WANDB_", "TIKTOKEN_")  # fmt: skip
ENVIRONMENT_FILE = ".deepspeed_env"  # DeepSpeed's: further ones, NAME=VALUE, in the home folder or here
# What a host answers when it is asked whether it can start ranks: a port that is free there, and its addresses.
ANSWER = "the port and the addresses:"
CHECK = (
    "import socket, subprocess, launch.node; s = socket.socket(); s.bind(('', 0)); "
    f"print('{ANSWER}', s.getsockname()[1]); "
    "print(subprocess.run(['hostname', '-I'], capture_output=True, text=True).stdout)"
)


def main() -> None:
    options, launcher_options = parse(sys.argv[1:])
    try:
        with user_errors(Path.cwd()):
            plans, ssh = make_plans(options, launcher_options)
        sys.exit(launch(plans, ssh))
    except KeyboardInterrupt:  # before there are ranks
        sys.exit(130)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that are DeepSpeed's local launcher's."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.deepspeed",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-H", "--hostfile", type=Path, help=f"lines such as `node-1 slots=8`; {DEFAULT_HOSTFILE} if "
                        "that is there, or else this machine")  # fmt: skip
    parser.add_argument("-i", "--include", default="", help="hosts and slots to use: node-1@node-2:0,2")
    parser.add_argument("-e", "--exclude", default="", help="hosts and slots not to use")
    parser.add_argument("--num_nodes", type=int, help="the first N hosts of the file")
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, help="ranks per host; without a GPU, on the CPU")
    parser.add_argument("--master_addr", help="of the first host; default: the first that `hostname -I` says there")
    parser.add_argument("--master_port", type=int, help="on the first host; default: one that is free")
    parser.add_argument("--ssh_port", type=int)
    parser.add_argument("--launcher_args", default="", help="further options of ssh, in one argument")
    parser.add_argument("--module", "--no_local_rank", action="store_true", help=argparse.SUPPRESS)  # they always are
    passed = parser.add_argument_group("passed on to DeepSpeed's launcher")
    passed.add_argument("--bind_cores_to_rank", action="store_true")
    passed.add_argument("--bind_core_list")
    passed.add_argument("--enable_each_rank_log", metavar="FOLDER")
    # Its own errors name the rank that it has started last, whichever has failed.
    passed.add_argument("--log_level", default="critical")
    parser.add_argument("program", help="the module that the ranks run, such as kraken_train.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its overrides")
    options = parser.parse_args(arguments)
    launcher_options = [f"--log_level={options.log_level}"]
    if options.bind_cores_to_rank:
        launcher_options.append("--bind_cores_to_rank")
    for name in ("bind_core_list", "enable_each_rank_log"):
        if getattr(options, name) is not None:
            launcher_options.append(f"--{name}={getattr(options, name)}")
    return options, launcher_options


def make_plans(options: argparse.Namespace, launcher_options: list[str]) -> tuple[dict[str, Plan], list[str]]:
    """What each host is to start, and the command that reaches another one. Raises ConfigError; starts nothing."""
    hosts = choose_hosts(options)
    ssh = [*SSH, *(("-p", str(options.ssh_port)) if options.ssh_port else ()), *shlex.split(options.launcher_args)]
    port, addresses = check_hosts(list(hosts), ssh)
    first = next(iter(hosts))
    address = "127.0.0.1" if len(hosts) == 1 else next(iter(addresses), first)
    run_dir = run_folder_of(options.arguments)
    own = {LAUNCH_COMMAND: shlex.join(["python", "-m", "launch.deepspeed", *sys.argv[1:]])}
    exported = exported_environment() | own
    plans = {
        host: Plan(
            node_rank=number,
            hosts=hosts,
            master_addr=options.master_addr or address,
            master_port=options.master_port or port,
            launcher_options=launcher_options,
            module=options.program,
            arguments=options.arguments,
            environment=own if is_here(host) else exported,
            run_dir=None if run_dir is None else str(run_dir),
            earlier_starts=newest_start_number(run_dir),
        )
        for number, host in enumerate(hosts)
    }
    return plans, ssh


def launch(plans: dict[str, Plan], ssh: list[str]) -> int:
    """Start the ranks, wait for their end, and say last what went wrong; the exit code."""
    nodes = [NodeProcess(host, plan, [] if is_here(host) else [*ssh, host]) for host, plan in plans.items()]
    words = Words()
    supervision = Supervision(nodes, words)
    supervision.run()
    verdict = judge(nodes[0].plan, {node.host: node.code for node in nodes}, words, supervision.asked)
    if verdict.messages != [words.latest]:
        print(*verdict.messages, sep="\n", end="\n" if verdict.messages else "", file=sys.stderr, flush=True)
    return verdict.exit_code


def choose_hosts(options: argparse.Namespace) -> Slots:
    """Raises ConfigError."""
    path = options.hostfile or (DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None)
    if path is not None:
        return choose(read_hostfile(path), options.include, options.exclude, options.num_nodes, options.num_gpus)
    if options.num_nodes is not None and options.num_nodes > 1:
        raise ConfigError(f"--num_nodes {options.num_nodes} needs the names of the hosts; give --hostfile FILE")
    return choose(this_machine(options.num_gpus), options.include, options.exclude, None, options.num_gpus)


def run_folder_of(arguments: list[str]) -> Path | None:
    """The run_dir among the overrides, where the ranks leave their errors; None if there is none."""
    values = [value for key, _, value in (argument.partition("=") for argument in arguments) if key == "run_dir"]
    return Path(values[-1]).expanduser().absolute() if values else None


def exported_environment() -> dict[str, str]:
    """What ranks on other hosts need of this environment, and DeepSpeed's files with more of it. Raises ConfigError."""
    exported = {name: value for name, value in os.environ.items() if name.startswith(EXPORTED)}
    exported["PYTHONPATH"] = python_path()
    for folder in (Path.home(), Path.cwd()):
        file = folder / os.environ.get("DS_ENV_FILE", ENVIRONMENT_FILE)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], start=1):
            name, separator, value = line.partition("=")
            if line.strip() and not separator:
                raise ConfigError(f"{file}:{number}: {line!r} must be NAME=VALUE")
            if line.strip():
                exported[name.strip()] = value
    return exported


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))


def remote_command(*python_arguments: str) -> str:
    """For the remote shell: Python as here, in the folder that we are in."""
    python = shlex.join(["env", f"PYTHONPATH={python_path()}", sys.executable, *python_arguments])
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {python}"


def check_hosts(hosts: list[str], ssh: list[str]) -> tuple[int, list[str]]:
    """Ask all hosts at once whether they can start ranks: a free port and the addresses of the first.

    Raises ConfigError naming all that cannot.
    """
    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = list(pool.map(lambda host: check_host(host, ssh), hosts))
    if problems := [answer.problem for answer in answers if answer.problem is not None]:
        raise ConfigError("; ".join(problems))
    return answers[0].port, answers[0].addresses


@dataclass(frozen=True)
class Answer:
    """Of a host to CHECK."""

    problem: str | None = None
    port: int = 0
    addresses: list[str] = field(default_factory=list)


def check_host(host: str, ssh: list[str]) -> Answer:
    here = is_here(host)
    command = [sys.executable, "-c", CHECK] if here else [*ssh, host, remote_command("-c", CHECK)]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=CHECK_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return Answer("ssh is not installed on this machine; install OpenSSH's client")
    except subprocess.TimeoutExpired:
        return Answer(f"host {host} does not answer within {CHECK_SECONDS:.0f} s; repair it, or --exclude it")
    if result.returncode == 0:
        # What the shell there says first is not for us.
        port, *addresses = result.stdout.rpartition(ANSWER)[2].split()
        return Answer(port=int(port), addresses=addresses)
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    if here or result.returncode != 255:
        return Answer(f"host {host} cannot start ranks: {reason}; it needs {Path.cwd()} and {sys.executable} as here")
    return Answer(f"host {host} cannot be reached by ssh: {reason}; `ssh {host} true` must work without a password")


@dataclass
class NodeProcess:
    """`launch.node` on a host, as the process here that is it or its ssh."""

    host: str
    plan: Plan
    ssh: list[str]  # none on this machine

    def start(self) -> None:
        command = [*self.ssh, remote_command("-u", "-m", "launch.node")] if self.ssh else [
            sys.executable, "-u", "-m", "launch.node"
        ]  # fmt: skip
        # A session of its own: what the terminal sends is for us to pass on.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.tell(self.plan.to_line())

    def tell(self, message: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended
            pipe: IO[bytes] = self.process.stdin  # type: ignore[assignment]
            pipe.write(message)
            pipe.flush()

    @property
    def code(self) -> int:
        """Its exit code; 1 where it or its connection was killed."""
        code = self.process.poll()
        return code if code is not None and 0 <= code < 255 else 1

    def kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.process.pid)
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    each.kill()


class Supervision:
    """Several nodes from their start to their end."""

    def __init__(self, nodes: list[NodeProcess], words: Words) -> None:
        self.nodes, self.words = nodes, words
        self.asked = False  # by a signal, to end
        self.impatient = False  # asked again from the keyboard
        self.stop_at = float("inf")  # when the nodes are told to stop
        self.told: float | None = None

    def run(self) -> None:
        for number in (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.on_signal)
        for node in self.nodes:
            node.start()
        readers = [threading.Thread(target=self.copy, args=(node,), daemon=True) for node in self.nodes]
        for reader in readers:
            reader.start()
        here_at = time.monotonic()
        while running := [node for node in self.nodes if node.process.poll() is None]:
            now = time.monotonic()
            if len(running) < len(self.nodes) and any(node.process.poll() for node in self.nodes):
                self.stop_at = min(self.stop_at, now + PEERS_SECONDS)
            if now > here_at + STILL_HERE_SECONDS:
                here_at = now
                for node in running:
                    node.tell(STILL_HERE)
            self.stop(running, now)
            time.sleep(0.1)
        for node, reader in zip(self.nodes, readers, strict=True):
            reader.join(5)
            if node.ssh and (node.process.returncode == 255 or node.process.returncode < 0):
                self.say(f"error: the connection to host {node.host} is lost")
            elif node.process.returncode < 0:
                self.say(f"error: launch.node on {node.host} {describe_end(node.process.returncode)}")

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.impatient = self.asked and number == signal.SIGINT
        self.asked = True
        self.stop_at = 0.0

    def stop(self, running: list[NodeProcess], now: float) -> None:
        if now <= self.stop_at:
            return
        if self.told is None:
            self.told = now
            if self.asked:
                self.say("the ranks are asked to save and end (Ctrl-C again kills them)")
            for node in running:
                node.tell(STOP)
        if self.impatient:
            self.impatient = False
            for node in running:
                node.tell(KILL)
        if now > self.told + LAUNCHER_SECONDS + PEERS_SECONDS:
            for node in running:
                self.say(f"error: host {node.host} does not end its ranks")
                node.kill()

    def copy(self, node: NodeProcess) -> None:
        """What its ranks say of errors, to our own; with several hosts each line has its host."""
        prefix = f"{node.host}: " if len(self.nodes) > 1 else ""
        pipe: IO[bytes] = node.process.stderr  # type: ignore[assignment]
        for raw in pipe:
            line = raw.decode(errors="replace")
            self.words.hear(line)
            with contextlib.suppress(OSError):  # nobody reads it
                sys.stderr.write(prefix + line)
                sys.stderr.flush()

    def say(self, line: str) -> None:
        self.words.hear(line)
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
