"""Kinds of faults: in which commands each strikes, at which random moment, and how that command may end."""

from __future__ import annotations

import errno
import json
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.attempt import Attempt, ForkedStart, Start, resume_process, wait_until
from chaos.plan import RELEASE, STEP, STRUCK
from chaos.victims import DEEPSPEED, STEPS, VICTIMS, Victim

# How a start with a fault may end.
FINISHED = "finished"  # with the whole of its result
MESSAGE = "message"  # with one error message
SAVED = "saved"  # it was asked to end, and has saved
KILLED = "killed"  # the command itself was killed, and can say nothing
REFUSED = "refused"  # damaged files, until they were repaired
TRAINING = ("train", "train-async", "train-P2", "train-DP2")
ON_RANKS = tuple(name for name, victim in VICTIMS.items() if DEEPSPEED in victim.launcher)
ONE_PROCESS = tuple(name for name, victim in VICTIMS.items() if victim.ranks == 1)
DAY = 86400.0


@dataclass
class Case:
    """One fault in one command, while it goes on."""

    name: str
    victim: Victim
    draw: random.Random  # all that is random about the case
    folder: Path
    undisturbed: Path  # the results of an undisturbed run
    count: Callable[[int, str], int]  # (rank, event) -> how many an undisturbed run has
    repeat: Callable[[], Attempt]  # the same command once more, without a fault
    story: list[str] = field(default_factory=list)  # what has happened, for the report

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def control(self) -> Path:
        return self.folder / "control"

    @property
    def has_struck(self) -> bool:
        return (self.control / STRUCK).exists()


@dataclass(frozen=True)
class Strike:
    """A moment in a process of the command, and what happens then (chaos.plan)."""

    event: str
    number: int
    action: str
    arguments: dict[str, Any]
    rank: int = 0


class Fault:
    """A kind of fault. `ends`: how a command that it has struck may end."""

    def __init__(self, name: str, victims: tuple[str, ...], ends: set[str]) -> None:
        self.name, self.victims, self.ends = name, victims, ends

    def impossible(self) -> str | None:
        """Why this machine cannot have it."""
        return next((reason for name in self.victims if (reason := VICTIMS[name].impossible()) is not None), None)

    def strike(self, case: Case) -> Strike | None:
        """Where it strikes in the first start; None: nothing strikes within it."""
        return None

    def before(self, case: Case) -> None:
        """Before the first start."""

    def wrapped(self, command: list[str]) -> list[str]:
        return command

    def during(self, case: Case, start: Start | ForkedStart) -> list[str]:
        """While the first start runs; returns what is wrong."""
        return []

    def between(self, case: Case) -> None:
        """After the first start and before the command is repeated."""

    def repair(self, case: Case) -> bool:
        """After a repetition was refused: put right what cannot be continued. False: there is nothing to repair."""
        return False

    def restore_input(self, case: Case) -> None:
        """Before the results are compared, which may lie beside a damaged input that the command has left alone."""

    def after(self, case: Case) -> None:
        """At the end, whatever has happened."""


def draw_moment(
    case: Case, rank: int = 0, only: str | None = None, first_step: int = 2, share: float = 1.0
) -> tuple[str, int]:
    """An event of a rank and its number, at random over a run, or over this share of it from the beginning."""
    event = only or case.draw.choice(case.victim.events)
    first = first_step if event == STEP else 1
    return event, case.draw.randint(first, max(first, int(share * case.count(rank, event))))


class Injected(Fault):
    """Strikes in one process of the command, at a random event or at the beginning of a random step."""

    def __init__(
        self, name: str, victims: tuple[str, ...], ends: set[str], action: str, arguments: Any = None,
        only: str | None = None, share: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(name, victims, ends)
        self.action, self.only, self.share = action, only, share
        self.arguments: Callable[[random.Random], dict[str, Any]] = arguments or (lambda draw: {})

    def strike(self, case: Case) -> Strike:
        rank = case.draw.randrange(case.victim.ranks)
        return Strike(
            *draw_moment(case, rank, self.only, share=self.share), self.action, self.arguments(case.draw), rank
        )


def signalling(
    name: str, victims: tuple[str, ...], ends: set[str], who: str, *numbers: int, asks_to_end: bool = False
) -> Injected:
    """A signal to a process, one of `numbers`; `asks_to_end`: it lets the run save and end, which the step waits for.

    It strikes at a step if it asks for that, or if it is to a process that may not be there before.
    """

    def arguments(draw: random.Random) -> dict[str, Any]:
        number = draw.choice(numbers)
        return {"who": who, "number": number, "nth": draw.randrange(4), "asks_to_end": asks_to_end}

    only = STEP if asks_to_end or who in (DEEPSPEED, "child tracking.follow") else None
    share = 0.5 if who == "worker" else 1.0  # later there may be none left
    return Injected(name, victims, ends, "signal", arguments, only, share)


class Stopped(Fault):
    """A process is stopped, and goes on after a while: at the end of the training, or at once where it is needed."""

    def __init__(self, name: str, victims: tuple[str, ...], who: str) -> None:
        super().__init__(name, victims, {FINISHED})
        self.who = who

    def strike(self, case: Case) -> Strike:
        only = None if self.who == "self" else STEP
        arguments = {"who": self.who, "number": int(signal.SIGSTOP)}
        return Strike(*draw_moment(case, only=only), "signal", arguments)

    def during(self, case: Case, start: Start | ForkedStart) -> list[str]:
        wait_until(lambda: case.has_struck or not start.is_running())
        if not case.has_struck:
            return []
        struck = json.loads((case.control / STRUCK).read_text(encoding="utf-8"))
        if self.who != "self":
            metrics = case.work / "run" / "metrics.jsonl"
            wait_until(lambda: f'"step": {STEPS},' in metrics.read_text(encoding="utf-8") or not start.is_running())
        resume_process(struck["pid"])
        return []


class Duplicate(Fault):
    """The same command is started again while it runs; the second is refused, or does no harm."""

    def __init__(self, name: str, victims: tuple[str, ...]) -> None:
        super().__init__(name, victims, {FINISHED})

    def strike(self, case: Case) -> Strike:
        return Strike(*draw_moment(case), "hold", {})

    def during(self, case: Case, start: Start | ForkedStart) -> list[str]:
        wait_until(lambda: case.has_struck or not start.is_running())
        if not case.has_struck:
            return []
        second = case.repeat()
        (case.control / RELEASE).touch()
        case.story.append(f"the second command ended with {second.code}: {'; '.join(second.errors)}")
        problems = [f"the second command left {process}" for process in second.left]
        if second.has_traceback:
            problems.append("the second command ended with a traceback")
        if second.code and len(second.errors) != 1:
            problems.append(f"the second command printed {len(second.errors)} error messages: {second.errors}")
        return problems


def gradient(factor: str) -> Injected:
    return Injected(
        f"{factor}-gradient", TRAINING, {MESSAGE}, "spoil gradient", lambda draw: {"factor": factor}, only=STEP
    )


TO_END = (signal.SIGTERM, signal.SIGUSR1)  # the run saves and ends
WRITERS = ("train", "train-async", "train-P2", "prepare", "export", "evaluate")
INJECTED = [
    signalling("kill-process", ONE_PROCESS, {KILLED}, "self", signal.SIGKILL),
    signalling("kill-rank", ON_RANKS, {MESSAGE}, "self", signal.SIGKILL),
    signalling("stop-rank", ON_RANKS, {MESSAGE}, "self", signal.SIGSTOP),
    signalling("kill-launcher", ON_RANKS, {KILLED}, DEEPSPEED, signal.SIGKILL, asks_to_end=True),
    signalling("kill-node", ON_RANKS, {MESSAGE, SAVED}, "launch.node", signal.SIGKILL, asks_to_end=True),
    signalling(
        "kill-deepspeed", ON_RANKS, {MESSAGE, SAVED}, "deepspeed.launcher.launch", signal.SIGKILL, asks_to_end=True
    ),
    signalling("end-launcher", ON_RANKS, {SAVED, FINISHED}, DEEPSPEED, *TO_END, signal.SIGINT, asks_to_end=True),
    signalling("end-process", ("train", "train-async"), {SAVED, FINISHED}, "self", *TO_END, asks_to_end=True),
    signalling("kill-worker", ("prepare-workers",), {MESSAGE, FINISHED}, "worker", signal.SIGKILL),
    signalling(
        "kill-tracking", ("train-wandb", "train-tensorboard"), {FINISHED}, "child tracking.follow", signal.SIGKILL
    ),
    Stopped("stop-process", ONE_PROCESS, "self"),
    Stopped("stop-launcher", ON_RANKS, DEEPSPEED),
    Stopped("stop-tracking", ("train-wandb", "train-tensorboard"), "child tracking.follow"),
    gradient("nan"),
    gradient("inf"),
    gradient("huge"),
    Injected("read-only", WRITERS, {MESSAGE, FINISHED}, "refuse files", lambda draw: {"error": errno.EROFS}),
    Injected("io-error", WRITERS, {MESSAGE, FINISHED}, "refuse files", lambda draw: {"error": errno.EIO}),
    Injected(
        "fsync-fails", WRITERS, {MESSAGE, FINISHED}, "fail fsync", lambda draw: {"times": draw.choice([1, 2, 1000])}
    ),
    Injected("slow-disk", WRITERS, {FINISHED}, "slow down", lambda draw: {"seconds": draw.choice([0.02, 0.1])}),
    Injected(
        "clock-jump", (*TRAINING, "prepare"), {FINISHED}, "move clock",
        lambda draw: {"seconds": draw.choice([-1, 1]) * draw.choice([1.0, 3600.0, 400 * DAY])},
    ),
    Injected(
        "memory-limit", ("train", "train-P2", "prepare", "evaluate", "generate"), {MESSAGE, FINISHED}, "limit memory"
    ),
    Duplicate("duplicate", ("train", "train-P2", "prepare", "export", "evaluate")),
]  # fmt: skip
