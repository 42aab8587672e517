"""The hosts and GPUs where ranks are started: a hostfile, and the options that select from it."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from kraken_train.common.errors import ConfigError
from kraken_train.common.files import require_regular

Slots = dict[str, list[str]]  # host -> the indices of its GPUs, in rank order

DEFAULT_HOSTFILE = Path("/job/hostfile")  # DeepSpeed's
LINE = re.compile(r"(\S+)\s+slots=(\d{1,4})\s*(#.*)?")


def read_hostfile(path: Path) -> Slots:
    """The hosts of a file with lines such as `node-1 slots=8`. Raises ConfigError."""
    require_regular(path, "--hostfile", ConfigError)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"--hostfile {path} cannot be read: {reason}; it needs a line such as `node-1 slots=8` for each host"
        ) from error
    hosts: Slots = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}:{number}: {line!r} must be a host and its GPUs, as in `node-1 slots=8`")
        name, slots = match[1], int(match[2])
        duplicate = next((host for host in hosts if host == name or (is_local(host) and is_local(name))), None)
        if duplicate is not None:
            also = "" if duplicate == name else f", as {duplicate}"
            raise ConfigError(
                f"{path}:{number}: {name} is listed twice{also}; give each host one line with all of its slots"
            )
        if slots == 0:
            raise ConfigError(f"{path}:{number}: {name} has slots=0; remove the line, or give the number of its GPUs")
        hosts[name] = [str(slot) for slot in range(slots)]
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host; add a line such as `node-1 slots=8` for each host")
    return hosts


def choose(hosts: Slots, include: str, exclude: str, num_nodes: int | None, num_gpus: int | None) -> Slots:
    """The hosts and slots that DeepSpeed's options select. Raises ConfigError if one does not exist."""
    if bool(include) + bool(exclude) + (num_nodes is not None or num_gpus is not None) > 1:
        raise ConfigError("--include, --exclude, and --num_nodes with --num_gpus exclude one another; use one of them")
    if include:
        return require_not_empty(filter_slots(hosts, "--include", include, keep=True))
    if exclude:
        return require_not_empty(filter_slots(hosts, "--exclude", exclude, keep=False))
    for option, number in (("--num_nodes", num_nodes), ("--num_gpus", num_gpus)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} {number} must be at least 1")
    if num_nodes is not None and num_nodes > len(hosts):
        raise ConfigError(
            f"--num_nodes {num_nodes} is more than the {len(hosts)} in --hostfile ({', '.join(hosts)}); add hosts to it"
        )
    chosen = {name: hosts[name][:num_gpus] for name in list(hosts)[:num_nodes]}
    for name, slots in chosen.items():
        if num_gpus is not None and len(slots) < num_gpus:
            raise ConfigError(f"--num_gpus {num_gpus} is more than {name} has (slots={len(slots)})")
    return chosen


def filter_slots(hosts: Slots, option: str, text: str, keep: bool) -> Slots:
    """Keep or remove the slots that `text` names: `node-1@node-2:0,2` means all of node-1 and two slots of node-2."""
    named: Slots = {}
    for part in text.split("@"):
        name, separator, numbers = part.partition(":")
        if name not in hosts:
            raise ConfigError(f"{option} {text}: there is no host {name!r}; use {', '.join(hosts)}")
        slots = [number.strip() for number in numbers.split(",")] if separator else hosts[name]
        for slot in slots:
            if slot not in hosts[name]:
                raise ConfigError(f"{option} {text}: {name} has no slot {slot!r}; use {', '.join(hosts[name])}")
        named.setdefault(name, []).extend(slots)
    return {
        name: left
        for name, slots in hosts.items()
        if (left := [slot for slot in slots if (slot in named.get(name, [])) == keep])
    }


def require_not_empty(hosts: Slots) -> Slots:
    if not hosts:
        raise ConfigError("--exclude leaves no slot; exclude less")
    return hosts


def local_slots(num_gpus: int | None) -> Slots:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES allows; without a GPU, `num_gpus` (default 1) CPU slots.

    Raises ConfigError if there are fewer GPUs than `num_gpus`.
    """
    # These import torch, which takes seconds and is not needed with a hostfile.
    from kraken_train.parallel.ranks import gpu_is_usable  # noqa: PLC0415

    if not gpu_is_usable():
        return {"localhost": [str(slot) for slot in range(num_gpus or 1)]}
    import torch  # noqa: PLC0415

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if num_gpus is not None and num_gpus > len(gpus):
        why = f"CUDA_VISIBLE_DEVICES={visible}" if visible else f"this machine has {len(gpus)}"
        raise ConfigError(f"--num_gpus {num_gpus} is more than the available GPUs ({why}); use {len(gpus)} at most")
    return {"localhost": gpus}


def is_local(host: str) -> bool:
    """Whether it is a name of this machine, so that ssh is not needed."""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn())
