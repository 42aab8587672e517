"""How many files this process may have open; a mapped shard is one, as long as it is mapped."""

from __future__ import annotations

import resource

import psutil

from kraken_train.common.errors import DataError

SPARE = 256  # for what is opened later: checkpoints, logs, connections between ranks


def allow_open_files(count: int, name: str) -> None:
    """Let the process open `count` more files, which `name` are, by raising its soft limit as far as it needs.

    Raises DataError where the hard limit, which only the system's administrator can raise, is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_open = psutil.Process().num_fds()
    wanted = is_open + count + SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < is_open + count:
        raise DataError(
            f"{name} are {count} files to have open, but this process may have {hard} (ulimit -Hn), and has {is_open}; "
            f"raise that limit to {wanted}, or prepare the data again with fewer and larger shards (shard_tokens)"
        )
