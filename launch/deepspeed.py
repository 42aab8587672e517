"""Starts ranks with DeepSpeed's launcher, on this machine or on the hosts of a hostfile:

    python -m launch.deepspeed [--hostfile FILE] [--num_nodes N] [--num_gpus N] kraken_train.train OVERRIDES...

It takes the options of `deepspeed --no_local_rank --module`, and adds: Hydra overrides are passed on unchanged; hosts
are checked before anything starts; SIGTERM, SIGUSR1, SIGINT and SIGHUP let the run save and end; no rank outlives the
launcher on any host; the last message and the exit code are those of the rank that failed first. It needs ssh without
a password and the same paths on every host, but not pdsh.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from kraken_train.common.cli import user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.common.help import VERSION, command_name
from kraken_train.run.layout import LAUNCH_COMMAND
from launch.exit_report import ErrorLines, diagnose, mark_aborted_followers
from launch.hosts import DEFAULT_HOSTFILE, Slots, choose, is_local, local_slots, read_hostfile
from launch.plan import Plan, newest_start_number
from launch.remote import SSH, check_hosts, python_path
from launch.supervision import NodeProcess, Supervision

# Environment variables with these prefixes are set for ranks on other hosts too. CUDA_VISIBLE_DEVICES is not: it
# differs between hosts.
EXPORTED = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW", "LD_LIBRARY_PATH", "DS_", "TORCH", "GLOO", "OMP_", "MKL_", "HF_",
            "WANDB_", "TIKTOKEN_")  # fmt: skip
# DeepSpeed's file with further variables, as lines NAME=VALUE, in the home folder or the current folder.
ENVIRONMENT_FILE = ".deepspeed_env"


def main() -> None:
    options, launcher_options = parse(sys.argv[1:])
    try:
        with user_errors(Path.cwd()):
            plans, ssh = make_plans(options, launcher_options)
        sys.exit(launch(plans, ssh))
    except KeyboardInterrupt:  # before the ranks are started
        sys.exit(130)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parsed options, and the options to pass on to DeepSpeed's launcher."""
    parser = argparse.ArgumentParser(
        prog=command_name(),
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("-H", "--hostfile", type=Path, help="file with lines such as `node-1 slots=8`; default: "
                        f"{DEFAULT_HOSTFILE} if it exists, or else this machine")  # fmt: skip
    parser.add_argument("-i", "--include", default="", help="hosts and slots to use: node-1@node-2:0,2")
    parser.add_argument("-e", "--exclude", default="", help="hosts and slots to leave out")
    parser.add_argument("--num_nodes", type=int, help="use the first N hosts of the file")
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, help="ranks per host; without a GPU, on the CPU")
    parser.add_argument(
        "--master_addr", help="address of the first host; default: the first one that `hostname -I` prints there"
    )
    parser.add_argument("--master_port", type=int, help="port on the first host; default: a free one")
    parser.add_argument("--ssh_port", type=int)
    parser.add_argument("--launcher_args", default="", help="further options of ssh, as one argument")
    parser.add_argument("--module", "--no_local_rank", action="store_true", help=argparse.SUPPRESS)  # always on
    passed = parser.add_argument_group("passed on to DeepSpeed's launcher")
    passed.add_argument("--bind_cores_to_rank", action="store_true")
    passed.add_argument("--bind_core_list")
    passed.add_argument("--enable_each_rank_log", metavar="FOLDER")
    # DeepSpeed's own errors name the rank that it started last, not the one that failed.
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
    """The plan of each host, and the ssh command that reaches hosts. Raises ConfigError; starts nothing."""
    hosts = choose_hosts(options)
    ssh = [*SSH, *(("-p", str(options.ssh_port)) if options.ssh_port else ()), *shlex.split(options.launcher_args)]
    port, addresses = check_hosts(list(hosts), ssh)
    first = next(iter(hosts))
    address = "127.0.0.1" if len(hosts) == 1 else next(iter(addresses), first)
    run_dir = find_run_dir(options.arguments)
    launch_command = {LAUNCH_COMMAND: shlex.join(["python", "-m", "launch.deepspeed", *sys.argv[1:]])}
    exported = exported_environment() | launch_command
    plans = {
        host: Plan(
            node_rank=number,
            hosts=hosts,
            master_addr=options.master_addr or address,
            master_port=options.master_port or port,
            launcher_options=launcher_options,
            module=options.program,
            arguments=options.arguments,
            environment=launch_command if is_local(host) else exported,
            run_dir=None if run_dir is None else str(run_dir),
            earlier_starts=newest_start_number(run_dir),
        )
        for number, host in enumerate(hosts)
    }
    return plans, ssh


def launch(plans: dict[str, Plan], ssh: list[str]) -> int:
    """Start the ranks, wait for their end, print what went wrong as the last lines; the exit code."""
    nodes = [NodeProcess(host, plan, ssh) for host, plan in plans.items()]
    error_lines = ErrorLines()
    supervision = Supervision(nodes, error_lines)
    supervision.run()
    exit_codes = {node.host: node.exit_code for node in nodes}
    mark_aborted_followers(nodes[0].plan, error_lines)
    report = diagnose(nodes[0].plan, exit_codes, error_lines, supervision.stop_requested)
    if report.messages != [error_lines.last_printed]:
        print(*report.messages, sep="\n", end="\n" if report.messages else "", file=sys.stderr, flush=True)
    return report.exit_code


def choose_hosts(options: argparse.Namespace) -> Slots:
    """The hosts and slots that the options select. Raises ConfigError."""
    path = options.hostfile or (DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None)
    if path is not None:
        return choose(read_hostfile(path), options.include, options.exclude, options.num_nodes, options.num_gpus)
    if options.num_nodes is not None and options.num_nodes > 1:
        raise ConfigError(f"--num_nodes {options.num_nodes} needs the names of the hosts; give --hostfile FILE")
    return choose(local_slots(options.num_gpus), options.include, options.exclude, None, options.num_gpus)


def find_run_dir(arguments: list[str]) -> Path | None:
    """The run_dir among the overrides, where ranks write their error files; None if it is not given."""
    values = [value for key, _, value in (argument.partition("=") for argument in arguments) if key == "run_dir"]
    return Path(values[-1]).expanduser().absolute() if values else None


def exported_environment() -> dict[str, str]:
    """The variables for ranks on other hosts: of this environment and of DeepSpeed's files. Raises ConfigError."""
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


if __name__ == "__main__":
    main()
