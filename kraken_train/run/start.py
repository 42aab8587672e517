"""One start of a run: what is recorded in RUN_DIR/starts/0001, to explain it afterwards.

config.yaml        the settings, resolved
environment.json   commands, hosts, versions, commit, Slurm's job
logs/              what each rank has printed, each line with its time: rank-0000.log
errors/            how a rank has failed, written by itself: rank-0000.json
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from kraken_train.common.errors import KrakenError, OutOfMemoryError, RankLostError
from kraken_train.common.files import replace_synced
from kraken_train.health.shutdown import Interrupted, Launchers
from kraken_train.parallel.ranks import Runtime, slurm_job
from kraken_train.run.events import now
from kraken_train.run.folder import system_errors
from kraken_train.run.layout import ENVIRONMENT_FILE, ERRORS, LAUNCH_COMMAND, LOGS
from kraken_train.run.rank_errors import RankError, record_error

COMMIT_FILE = "COMMIT"  # beside the packages, where they are a copy, see launch/slurm/snapshot.py
VERSIONS_OF = ("torch", "deepspeed", "numpy", "transformers", "wandb", "hydra-core")
DRAWING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and movements of the cursor


@contextmanager
def recorded(folder: Path, runtime: Runtime) -> Iterator[Path]:
    """A context whose output goes to this rank's log as well, and whose error is kept; gives the log's path.

    Raises CheckpointError where the log cannot be written.
    """
    log_path = folder / LOGS / f"rank-{runtime.rank:04d}.log"
    with ExitStack() as held:
        with system_errors(f"{log_path} cannot be written"):
            for name in (LOGS, ERRORS):
                (folder / name).mkdir(parents=True, exist_ok=True)
            log = log_path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        held.callback(close_log, log)
        held.enter_context(redirect_stdout(Tee(sys.stdout, log)))
        held.enter_context(redirect_stderr(Tee(sys.stderr, log)))
        faulthandler.enable(log)  # a crash in C writes the Python stacks there
        held.callback(faulthandler.disable)
        try:
            yield log_path
        except Interrupted:
            raise
        except Exception as error:
            record_error(folder, describe_error(error, runtime))
            raise


def close_log(log: TextIO) -> None:
    with suppress(OSError):  # closing retries what did not fit on a full disk; that must not hide the error of the run
        log.close()


class Tee(io.TextIOBase):
    """Writes to a stream as it is, and to a log whole lines with their time, without what only draws on a terminal."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self.stream = stream
        self.log = log
        self.line = ""

    def write(self, text: str) -> int:
        written = self.stream.write(text)
        lines = [overwritten(line) for line in (self.line + DRAWING.sub("", text)).split("\n")]
        self.line = lines.pop()
        with suppress(OSError, ValueError):  # a full disk, or a closed file; the stream has the text
            self.log.write("".join(f"{now()} {line}\n" for line in lines if line))
        return written

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


def overwritten(line: str) -> str:
    """What a terminal shows of a line that was overwritten several times."""
    return line.rpartition("\r")[2]


def describe_error(error: Exception, runtime: Runtime) -> RankError:
    expected = isinstance(error, KrakenError)
    lacks_memory = isinstance(error, OutOfMemoryError)  # where it was asked for helps to find out why
    return RankError(
        time=now(),
        rank=runtime.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        message=str(error) if expected else f"{type(error).__name__}: {error}",
        traceback=None if expected and not lacks_memory else "".join(traceback.format_exception(error)),
        follows=isinstance(error, RankLostError),
        restart_helps=error.restart_helps if isinstance(error, KrakenError) else True,
    )


def write_environment(folder: Path, runtime: Runtime) -> None:
    """A collective. Raises CheckpointError, on all ranks, where it cannot be written."""
    hosts = runtime.gather(socket.gethostname())

    def write() -> None:
        with system_errors(f"{folder} cannot be written"):
            replace_synced(folder / ENVIRONMENT_FILE, json.dumps(describe_environment(hosts, runtime), indent=1))

    runtime.on_first(write)


def describe_environment(hosts: Iterable[str], runtime: Runtime) -> dict[str, Any]:
    """What this start runs in. `hosts` are those of the ranks, in their order."""
    cuda = runtime.device.type == "cuda"
    return {
        "command": shlex.join(psutil.Process().cmdline()),
        "launchers": [shlex.join(process.cmdline()) for process in Launchers().processes if process.is_running()],
        "launch_command": os.environ.get(LAUNCH_COMMAND),
        "folder": str(Path.cwd()),
        "hosts": list(hosts),
        "world_size": runtime.world_size,
        "device": torch.cuda.get_device_name(runtime.device) if cuda else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "versions": {name: version for name in VERSIONS_OF if (version := installed_version(name)) is not None},
        "cuda": torch.version.cuda,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "commit": git_commit(),
        **slurm_job(),
    }


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit that this code is of, with "+" if files have changed since; None outside a repository."""
    here = Path(__file__).parent
    noted = here.parent / COMMIT_FILE
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip() or None

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, encoding="utf-8", errors="replace", check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
