"""Kinds of faults that change files between two starts: torn, flipped, truncated, mixed and missing ones.

A training is killed once it has two checkpoints; then a file of its newest checkpoint, of the rest of its folder, or of
its data is damaged. Other commands find one of their inputs damaged.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

from chaos.faults import FINISHED, KILLED, MESSAGE, REFUSED, Case, Fault, Strike, draw_moment
from chaos.plan import STEP
from chaos.victims import DEEPSPEED, SAVE_EVERY

SECTOR = 512  # bytes that a disk writes as one


def flip(content: bytes, other: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def truncate(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def tear(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Some sectors were never written."""
    sectors = -(-len(content) // SECTOR)
    begin = draw.randrange(sectors)
    end = draw.randint(begin + 1, sectors) * SECTOR
    return content[: begin * SECTOR] + bytes(min(end, len(content)) - begin * SECTOR) + content[end:]


def mix(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return other


class Damage(Fault):
    """A file that has been written is no longer what it was. `change` None: it is gone."""

    def __init__(self, name: str, change: Callable[[bytes, bytes, random.Random], bytes] | None) -> None:
        victims = ("train", "train", "train-P2", "export", "evaluate", "generate")
        super().__init__(name, victims, {KILLED, MESSAGE, FINISHED, REFUSED})
        self.change = change
        self.kept: dict[str, tuple[Path, bytes]] = {}  # what was there before, by case
        self.damaged: dict[str, bytes | None] = {}  # what it has become

    def strike(self, case: Case) -> Strike | None:
        if STEP not in case.victim.events:
            return None
        event, number = draw_moment(case, only=STEP, first_step=2 * SAVE_EVERY + 1)
        who = "self" if case.victim.ranks == 1 else DEEPSPEED
        return Strike(event, number, "signal", {"who": who, "number": int(signal.SIGKILL)})

    def before(self, case: Case) -> None:
        if STEP not in case.victim.events:
            self.damage(case)

    def between(self, case: Case) -> None:
        if STEP in case.victim.events:
            self.damage(case)

    def damage(self, case: Case) -> None:
        path, other = self.draw_files(case)
        content = path.read_bytes()
        self.kept[case.name] = path, content
        damaged = None if self.change is None else self.change(content, other.read_bytes(), case.draw)
        self.damaged[case.name] = damaged
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        case.story.append(f"{path.relative_to(case.work)}: {self.name}")

    def draw_files(self, case: Case) -> tuple[Path, Path]:
        """A file to damage, and one to take its place."""
        files = [path for path in sorted(case.work.rglob("*")) if path.is_file() and path.stat().st_size]
        if case.victim.name in ("evaluate", "generate"):
            files = [path for path in files if path.parts[len(case.work.parts)] in ("data", "export")]
        checkpoints = sorted(case.work.glob("run/checkpoints/step-????????"))
        newest = sorted(path for path in checkpoints[-1].iterdir()) if checkpoints else []
        # Half of the time the newest checkpoint, of which each file matters.
        path = case.draw.choice(newest if newest and case.draw.random() < 0.5 else self.that_matter(files))
        if path in newest:
            return path, checkpoints[-2] / path.name
        others = [other for other in files if other != path and other.suffix == path.suffix] or files
        return path, case.draw.choice(others)

    def that_matter(self, files: list[Path]) -> list[Path]:
        """Without logs and records of earlier starts, which nothing is computed from."""
        ignored = ("starts", "checkpoints")
        return [
            path for path in files
            if not set(path.parts) & set(ignored) and not path.name.startswith(".lock")
            and path.name not in ("metrics.jsonl", "evaluation.json", "README.md")
        ]  # fmt: skip

    def restore_input(self, case: Case) -> None:
        """A training's folder is all of its result, so there nothing is put back."""
        path, _ = self.kept[case.name]
        found = path.read_bytes() if path.is_file() else None
        if STEP not in case.victim.events and found == self.damaged[case.name]:
            self.repair(case)

    def repair(self, case: Case) -> bool:
        path, content = self.kept[case.name]
        if path.is_file() and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        case.story.append(f"{path.relative_to(case.work)} was put back")
        return True


DAMAGES = [
    Damage("flipped-file", flip),
    Damage("truncated-file", truncate),
    Damage("torn-file", tear),
    Damage("mixed-files", mix),
    Damage("missing-file", None),
]
