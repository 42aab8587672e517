"""Slurm's commands: what the cluster has, whether it would take a job, and handing jobs over."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import suggestion

UNLIMITED = "infinite"
ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")


class SlurmError(ConfigError):
    """What Slurm has refused, in its own words."""


@dataclass(frozen=True)
class Partition:
    """What `sinfo` and `scontrol` tell of a partition."""

    name: str
    is_default: bool
    time_limit: str  # as Slurm writes it, or UNLIMITED
    nodes: dict[int, int]  # GPUs per node -> how many such nodes
    max_nodes: int | None  # of a job
    accounts: tuple[str, ...] | None  # None: all
    qos: tuple[str, ...] | None

    @property
    def gpus_per_node(self) -> int:
        """Of the nodes that have most."""
        return max(self.nodes, default=0)

    def nodes_with(self, gpus: int) -> int:
        return sum(count for has, count in self.nodes.items() if has >= gpus)


def call(*command: str, given: str | None = None) -> str:
    """What a command of Slurm prints, `given` something to read. Raises SlurmError with what it complains about."""
    try:
        result = subprocess.run(
            command, input=given, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} on this machine; submit from a login node of the cluster, or look at the script "
            "with dry_run=true"
        ) from error
    if result.returncode:
        said = " ".join(line.strip() for line in result.stderr.splitlines() if line.strip())
        raise SlurmError(f"{command[0]} has refused: {said or f'exit code {result.returncode}'}")
    return result.stdout


def partitions() -> list[Partition]:
    """All partitions that this user sees. Raises SlurmError."""
    rules = {}
    for line in call("scontrol", "--oneliner", "show", "partition").splitlines():
        told = dict(re.findall(r"(\w+)=(\S*)", line))
        rules[told["PartitionName"]] = told
    found: dict[str, Partition] = {}
    for line in call("sinfo", "--noheader", "--format=%P|%l|%D|%G").splitlines():
        name, time_limit, count, gres = line.strip().split("|")
        key = name.rstrip("*")
        if key not in found:
            told = rules.get(key, {})
            most = told.get("MaxNodes", "")
            allowed = listed(told.get("AllowAccounts")), listed(told.get("AllowQos"))
            found[key] = Partition(
                key, name.endswith("*"), time_limit, {}, int(most) if most.isdigit() else None, *allowed
            )
        nodes, gpus = found[key].nodes, gpus_of(gres)
        nodes[gpus] = nodes.get(gpus, 0) + int(count)
    return list(found.values())


def listed(names: str | None) -> tuple[str, ...] | None:
    return None if names in (None, "ALL", "N/A", "(null)") else tuple(str(names).split(","))


def gpus_of(gres: str) -> int:
    """`gpu:a100:8(S:0-1),nvme:1` -> 8."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu:(?:[^:,(]+:)?(\d+)", gres))


def choose_partition(known: Sequence[Partition], name: str | None) -> Partition:
    """The one of that name, or the cluster's default. Raises ConfigError."""
    names = tuple(partition.name for partition in known)
    if name is None:
        default = next((partition for partition in known if partition.is_default), None)
        if default is None:
            raise ConfigError(f"this cluster has no default partition; give partition={' or '.join(names)}")
        return default
    for partition in known:
        if partition.name == name:
            return partition
    raise ConfigError(f"partition={name} is not known here; use {' or '.join(names)}{suggestion(name, names)}")


def require_allowed(partition: Partition, account: str | None, qos: str | None) -> None:
    """Raises ConfigError for a job that would wait for ever, which many a Slurm does not refuse by itself."""
    for name, value, allowed in (("account", account, partition.accounts), ("qos", qos, partition.qos)):
        if value is not None and allowed is not None and value not in allowed:
            raise ConfigError(
                f"{name}={value} cannot use partition {partition.name}; use {' or '.join(allowed)}"
                f"{suggestion(value, allowed)}, or another partition"
            )


def require_room(partition: Partition, nodes: int, gpus_per_node: int, time: str) -> None:
    """Raises ConfigError for a job that could never run there."""
    has = min(sum(partition.nodes.values()), partition.max_nodes or 10**9)
    if nodes > has:
        raise ConfigError(f"nodes={nodes} is more than partition {partition.name} has; use at most {has}")
    if gpus_per_node > partition.gpus_per_node:
        raise ConfigError(
            f"gpus_per_node={gpus_per_node} is more than a node of partition {partition.name} has; use at most "
            f"{partition.gpus_per_node}"
            + ("" if partition.gpus_per_node else ", and ranks_per_node=NUMBER for ranks on its processors")
        )
    if nodes > partition.nodes_with(gpus_per_node):
        raise ConfigError(
            f"nodes={nodes} is more than the {partition.nodes_with(gpus_per_node)} nodes of partition {partition.name} "
            f"that have gpus_per_node={gpus_per_node}"
        )
    if partition.time_limit != UNLIMITED and seconds(time) > seconds(partition.time_limit):
        raise ConfigError(
            f"time={time} is longer than partition {partition.name} allows; use at most {partition.time_limit} (the "
            "job requeues itself at the end of its time, and continues)"
        )


def seconds(time: str) -> int:
    """Of a time as Slurm writes it: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]].

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
    """Raises SlurmError if Slurm would not take this script: a wrong account, too much memory, no such feature."""
    call("sbatch", "--test-only", given=script)


def submit(script: Path, arguments: Sequence[str], *options: str) -> str:
    """Hand a script over; its job's number. Raises SlurmError."""
    return call("sbatch", "--parsable", *options, str(script), *arguments).strip().partition(";")[0]


def is_active(job: str) -> bool:
    """Whether a job still waits or runs."""
    try:
        states = call("squeue", "--noheader", "--jobs", job, "--format=%T").split()
    except SlurmError:  # it is so old that Slurm has forgotten it
        return False
    return any(state in ACTIVE for state in states)
