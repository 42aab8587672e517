"""The plan of a launch for one host: what `launch.deepspeed` sends and `launch.node` starts."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from kraken_train.health.shutdown import LOCAL_LAUNCHER, STARTED_BY_NODE
from kraken_train.run.layout import start_folders


@dataclass(frozen=True)
class Plan:
    """What one host starts."""

    node_rank: int
    hosts: dict[str, list[str]]  # all hosts of the job, each with its slots
    master_addr: str
    master_port: int
    launcher_options: list[str]
    module: str
    arguments: list[str]
    environment: dict[str, str]  # added to the environment of the host
    run_dir: str | None  # where the errors of killed ranks are recorded
    earlier_starts: int  # the number of the run's newest start before this launch

    @property
    def slots(self) -> list[str]:
        return list(self.hosts.values())[self.node_rank]

    def newest_start(self) -> Path | None:
        """The folder of the start that this launch made in the run; None as long as it does not exist."""
        number = newest_start_number(self.run_dir)
        return start_folders(Path(self.run_dir))[-1] if self.run_dir and number > self.earlier_starts else None

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    def command(self) -> list[str]:
        """The command that `deepspeed` would start on this host, with Hydra overrides unchanged."""
        node_rank = [f"--node_rank={self.node_rank}"] if len(self.hosts) > 1 else []
        return [
            *(sys.executable, "-u", "-X", STARTED_BY_NODE, "-m", LOCAL_LAUNCHER),
            f"--world_info={encode_world(self.hosts)}",
            *node_rank,
            f"--master_addr={self.master_addr}",
            f"--master_port={self.master_port}",
            "--module",
            "--no_local_rank",
            *self.launcher_options,
            self.module,
            *self.arguments,
        ]


def newest_start_number(run_dir: str | Path | None) -> int:
    """The number of the newest start of a run; 0 if it has none."""
    folders = start_folders(Path(run_dir)) if run_dir is not None else []
    return int(folders[-1].name) if folders else 0


def encode_world(hosts: dict[str, list[str]]) -> str:
    """The value of DeepSpeed's option --world_info."""
    return base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
