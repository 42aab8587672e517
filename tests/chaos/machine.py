"""Kinds of faults that need something of the machine: a small disk, a network of its own, a limit of memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from chaos.faults import FINISHED, KILLED, MESSAGE, ON_RANKS, TRAINING, WRITERS, Case, Fault, Strike, draw_moment
from chaos.plan import STEP

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")  # of version 1 of control groups
SPARE_BYTES = 32 << 20
PAGE = 4096


def refusal_of(*command: str) -> str | None:
    """Why the system refuses a command; None if it does not."""
    if shutil.which(command[0]) is None:
        return f"there is no command {command[0]}"
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else f"{' '.join(command)}: {result.stderr.strip()}"


def used_bytes(folder: Path) -> int:
    """What a file system of pages needs for a folder."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE if path.is_file() else PAGE for path in folder.rglob("*"))


class FullDisk(Fault):
    """The folder is on a small disk of its own, which is full at a random moment, and larger afterwards."""

    def __init__(self) -> None:
        super().__init__("full-disk", WRITERS, {MESSAGE, FINISHED})

    def impossible(self) -> str | None:
        refusal = refusal_of("unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt")
        return refusal and f"no file system can be mounted ({refusal})"

    def before(self, case: Case) -> None:
        """Mount a tmpfs that holds the inputs and a random part of what an undisturbed run adds to them."""
        inputs, undisturbed = used_bytes(case.work), used_bytes(case.undisturbed)
        size = inputs + PAGE * case.draw.randint(1, max(1, (undisturbed - inputs) // PAGE))
        filled = case.work.rename(case.work.with_name("inputs"))
        case.work.mkdir()
        self.mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(case.work))
        shutil.copytree(filled, case.work, dirs_exist_ok=True)
        case.story.append(f"a disk of {size} bytes, {inputs} of them for the inputs")

    def between(self, case: Case) -> None:
        self.mount("-o", "remount,size=256m", str(case.work))

    def after(self, case: Case) -> None:
        if case.work.is_mount():
            subprocess.run(["umount", "-l", str(case.work)], check=True)

    def mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)


class OutOfMemory(Fault):
    """The kernel kills one process, since its control group has no memory left."""

    def __init__(self) -> None:
        super().__init__("out-of-memory", (*TRAINING, "prepare", "evaluate", "generate"), {MESSAGE, KILLED})

    def impossible(self) -> str | None:
        if not os.access(MEMORY_GROUPS / "cgroup.procs", os.W_OK):
            return f"{MEMORY_GROUPS} cannot be written"
        return None

    def strike(self, case: Case) -> Strike:
        group = MEMORY_GROUPS / case.name
        group.mkdir(exist_ok=True)
        arguments = {"group": str(group), "spare_bytes": SPARE_BYTES}
        rank = case.draw.randrange(case.victim.ranks)
        return Strike(*draw_moment(case, rank), "exhaust memory", arguments, rank)

    def after(self, case: Case) -> None:
        (MEMORY_GROUPS / case.name).rmdir()


class NetworkCut(Fault):
    """The ranks run in a network of their own, which is cut between them."""

    def __init__(self) -> None:
        super().__init__("network-cut", ON_RANKS, {MESSAGE})

    def impossible(self) -> str | None:
        if shutil.which("ip") is None:
            return "there is no command ip"
        refusal = refusal_of("unshare", "-n", "ip", "link", "set", "lo", "up")
        return refusal and f"no network namespace can be made ({refusal})"

    def wrapped(self, command: list[str]) -> list[str]:
        return ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]

    def strike(self, case: Case) -> Strike:
        return Strike(*draw_moment(case, only=STEP), "cut network", {})


MACHINE = [FullDisk(), OutOfMemory(), NetworkCut()]
