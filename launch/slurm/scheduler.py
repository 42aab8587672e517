"""Slurm's commands: which partitions the cluster has, whether it would accept a job, and submitting jobs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import suggestion

UNLIMITED = "infinite"
ACTIVE_STATES = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")


class SlurmError(ConfigError):
    """A command of Slurm failed; the message contains Slurm's own."""


@dataclass(frozen=True)
class Partition:
    """A partition as `sinfo` and `scontrol` describe it."""

    name: str
    is_default: bool
    time_limit: str  # in Slurm's notation, or UNLIMITED
    nodes: dict[int, int]  # GPUs per node -> number of such nodes
    max_nodes: int | None  # per job; None: no limit
    accounts: tuple[str, ...] | None  # that may use it; None: all
    qos: tuple[str, ...] | None

    @property
    def gpus_per_node(self) -> int:
        """The largest number of GPUs of any of its nodes."""
        return max(self.nodes, default=0)

    def nodes_with(self, gpus: int) -> int:
        """The number of nodes with at least so many GPUs."""
        return sum(count for node_gpus, count in self.nodes.items() if node_gpus >= gpus)


def call(*command: str, stdin: str | None = None) -> str:
    """The output of a Slurm command. Raises SlurmError with its error message."""
    try:
        result = subprocess.run(
            command, input=stdin, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} on this machine; submit from a login node of the cluster, or print the script "
            "with dry_run=true"
        ) from error
    if result.returncode:
        message = " ".join(line.strip() for line in result.stderr.splitlines() if line.strip())
        raise SlurmError(f"{command[0]} failed: {message or f'exit code {result.returncode}'}")
    return result.stdout


def read_partitions() -> list[Partition]:
    """All partitions that this user can see. Raises SlurmError."""
    settings = {}
    for line in call("scontrol", "--oneliner", "show", "partition").splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        settings[values["PartitionName"]] = values
    found: dict[str, Partition] = {}
    for line in call("sinfo", "--noheader", "--format=%P|%l|%D|%G").splitlines():
        name, time_limit, count, gres = line.strip().split("|")
        key = name.rstrip("*")
        if key not in found:
            values = settings.get(key, {})
            max_nodes = values.get("MaxNodes", "")
            found[key] = Partition(
                name=key,
                is_default=name.endswith("*"),
                time_limit=time_limit,
                nodes={},
                max_nodes=int(max_nodes) if max_nodes.isdigit() else None,
                accounts=parse_names(values.get("AllowAccounts")),
                qos=parse_names(values.get("AllowQos")),
            )
        nodes, gpus = found[key].nodes, parse_gpus(gres)
        nodes[gpus] = nodes.get(gpus, 0) + int(count)
    return list(found.values())


def parse_names(names: str | None) -> tuple[str, ...] | None:
    """`lab,class` -> ("lab", "class"); None for all."""
    return None if names is None or names in ("ALL", "N/A", "(null)") else tuple(names.split(","))


def parse_gpus(gres: str) -> int:
    """The number of GPUs in a list of generic resources: `gpu:a100:8(S:0-1),nvme:1` -> 8."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu:(?:[^:,(]+:)?(\d+)", gres))


def choose_partition(partitions: Sequence[Partition], name: str | None) -> Partition:
    """The partition of that name, or the cluster's default if it is None. Raises ConfigError."""
    names = tuple(partition.name for partition in partitions)
    if name is None:
        default = next((partition for partition in partitions if partition.is_default), None)
        if default is None:
            raise ConfigError(f"this cluster has no default partition; give partition={' or '.join(names)}")
        return default
    for partition in partitions:
        if partition.name == name:
            return partition
    raise ConfigError(f"partition={name} is not on this cluster; use {' or '.join(names)}{suggestion(name, names)}")


def require_allowed(partition: Partition, account: str | None, qos: str | None) -> None:
    """Raises ConfigError if account or QOS may not use the partition: Slurm may accept the job and never start it."""
    for name, value, allowed in (("account", account, partition.accounts), ("qos", qos, partition.qos)):
        if value is not None and allowed is not None and value not in allowed:
            raise ConfigError(
                f"{name}={value} cannot use partition {partition.name}; use {' or '.join(allowed)}"
                f"{suggestion(value, allowed)}, or another partition"
            )


def require_available(partition: Partition, nodes: int, gpus_per_node: int, time: str) -> None:
    """Raises ConfigError if a job needs more nodes, GPUs or time than the partition offers."""
    most = min(sum(partition.nodes.values()), partition.max_nodes or 10**9)
    if nodes > most:
        raise ConfigError(f"nodes={nodes} is more than partition {partition.name} allows; use at most {most}")
    if gpus_per_node > partition.gpus_per_node:
        raise ConfigError(
            f"gpus_per_node={gpus_per_node} is more than a node of partition {partition.name} has; use at most "
            f"{partition.gpus_per_node}"
            + ("" if partition.gpus_per_node else ", and ranks_per_node=NUMBER for ranks on CPUs")
        )
    if nodes > partition.nodes_with(gpus_per_node):
        raise ConfigError(
            f"nodes={nodes} is more than the {partition.nodes_with(gpus_per_node)} nodes of partition {partition.name} "
            f"that have gpus_per_node={gpus_per_node}; use fewer nodes, or fewer GPUs per node"
        )
    if partition.time_limit != UNLIMITED and seconds(time) > seconds(partition.time_limit):
        raise ConfigError(
            f"time={time} is longer than partition {partition.name} allows; use at most {partition.time_limit} (the "
            "job requeues itself at its time limit, and continues)"
        )


def seconds(time: str) -> int:
    """Converts a time in Slurm's notation: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]].

    Raises ConfigError.
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise ConfigError(f"time={time} is not a time of Slurm; write it as 24:00:00 or 2-12:00:00 (days-hours)")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, rest_seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, rest_seconds = parts
    else:
        hours, (minutes, rest_seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds


def require_accepted(script: str) -> None:
    """Raises SlurmError if Slurm would reject this script: a wrong account, too much memory, an unknown feature."""
    call("sbatch", "--test-only", stdin=script)


def submit(script: Path, arguments: Sequence[str], *options: str) -> str:
    """Submit a script; the id of its job. Raises SlurmError."""
    return call("sbatch", "--parsable", *options, str(script), *arguments).strip().partition(";")[0]


def is_active(job: str) -> bool:
    """Whether a job is still pending or running."""
    try:
        states = call("squeue", "--noheader", "--jobs", job, "--format=%T").split()
    except SlurmError:  # Slurm no longer knows a job that ended long ago
        return False
    return any(state in ACTIVE_STATES for state in states)
