"""In a process of the command: counts its events, and strikes at one of them.

Events are the beginnings of optimizer steps, the tokens that the inference engine computes, and, below the watched
folder, file operations that change something: a file is opened for writing, renamed, removed or synced, a folder is
made. Python's audit hooks report file operations from every library, before they happen, and can refuse them.
"""

from __future__ import annotations

import atexit
import errno
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from chaos.plan import FILE, RELEASE, STEP, STRUCK, TOKEN, VARIABLE, Plan

FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Python's audit events of file operations that change something, and where their arguments name a folder that the path
# is relative to.
CHANGES = {"os.rename": 2, "os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": None, "os.link": 2}
SMALL_BLOCK_BYTES = 4000  # so that preparing a small corpus has several pieces
LATER = "later"  # of an action: it strikes at the next event instead
HUGE = 1e30  # the square of any gradient times this is no number of fp32


class Injection:
    """The events of this process so far, and what the fault has changed for those to come."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.counts = {STEP: 0, FILE: 0, TOKEN: 0}
        # The fault has not struck yet; a job that Slurm has requeued starts in the same environment again.
        self.waiting = plan.number > 0 and not Path(plan.control, STRUCK).exists()
        self.refusal: int | None = None  # the error of every further file operation
        self.failures_of_fsync = 0  # so many further ones fail
        self.delay = 0.0  # seconds, at most, of each further file operation
        self.draw = random.Random(plan.case)
        self.lock = threading.RLock()
        self.inside = threading.local()  # the thread is in `happens`: its own file operations are no events

    def happens(self, event: str, path: str = "", trainer: Any = None) -> None:
        """An event is about to happen. Raises OSError where the fault refuses it."""
        if getattr(self.inside, "busy", False):
            return
        self.inside.busy = True
        try:
            with self.lock:
                self.counts[event] += 1
                due = self.waiting and event == self.plan.event and self.counts[event] >= self.plan.number
                self.waiting = self.waiting and not due
            if due:
                self.waiting = ACTIONS[self.plan.action](self, trainer, **self.plan.arguments) is LATER
        finally:
            self.inside.busy = False
        if event == FILE and self.delay:
            time.sleep(self.draw.uniform(0, self.delay))
        if event == FILE and self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal), path)

    def is_watched(self, path: str) -> bool:
        return path.startswith(self.plan.watched + os.sep)

    def on_audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        changes = arguments[2] & FOR_WRITING if name == "open" else name in CHANGES
        if not changes or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        place = CHANGES.get(name)
        folder = arguments[place] if place is not None else -1
        base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
        path = os.path.normpath(os.path.join(base, os.fsdecode(arguments[0])))
        if self.is_watched(path):
            self.happens(FILE, path)

    def watch_fsync(self) -> None:
        original = os.fsync

        def fsync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if self.is_watched(path):
                self.happens(FILE, path)
                if self.failures_of_fsync > 0:
                    self.failures_of_fsync -= 1
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            original(file)

        os.fsync = fsync

    def watch_steps(self, module: ModuleType) -> None:
        original = module.Trainer.train_step

        def train_step(trainer: Any) -> None:
            self.happens(STEP, trainer=trainer)
            original(trainer)

        module.Trainer.train_step = train_step

    def watch_tokens(self, module: ModuleType) -> None:
        original = module.InferenceEngine.add_tokens

        def add_tokens(engine: Any, token_ids: Any) -> Any:
            self.happens(TOKEN)
            return original(engine, token_ids)

        module.InferenceEngine.add_tokens = add_tokens

    def leave_word(self, **what: Any) -> None:
        """Tell the harness that the fault has struck."""
        temporary = Path(self.plan.control, f".{STRUCK}")
        temporary.write_text(json.dumps(what), encoding="utf-8")
        temporary.rename(temporary.with_name(STRUCK))

    def write_counts(self) -> None:
        name = f"counts-{self.plan.module}-{own_rank()}.json"
        Path(self.plan.control, name).write_text(json.dumps(self.counts), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------
# Actions
# --------------------------------------------------------------------------------------------------------------


def send_signal(
    injection: Injection, trainer: Any, who: str, number: int, nth: int = 0, asks_to_end: bool = False
) -> str | None:
    """`who`: self, a launcher by its module, `child MODULE` or `worker` (the nth of them).

    The step goes on once the rank knows that it has to end, where that is what the signal leads to.
    """
    pids = find_processes(who)
    if not pids:
        return LATER  # it has not started yet
    pid = pids[nth % len(pids)]
    injection.leave_word(who=who, pid=pid, signal=number)
    os.kill(pid, number)
    while asks_to_end and not trainer.stop.requested:
        time.sleep(0.05)
    return None


def find_processes(who: str) -> list[int]:
    import psutil  # noqa: PLC0415 (not in every process)

    this = psutil.Process()
    if who == "self":
        return [this.pid]
    if who == "worker":
        return [child.pid for child in this.children() if "spawn_main" in " ".join(child.cmdline())]
    if who.startswith("child "):
        name = who.removeprefix("child ")
        return [child.pid for child in this.children(recursive=True) if name in " ".join(child.cmdline())]
    return [parent.pid for parent in this.parents() if module_of(parent.cmdline()) == who]


def refuse_files(injection: Injection, trainer: Any, error: int) -> None:
    injection.leave_word(error=error)
    injection.refusal = error


def fail_fsync(injection: Injection, trainer: Any, times: int) -> None:
    injection.leave_word(times=times)
    injection.failures_of_fsync = times


def slow_down(injection: Injection, trainer: Any, seconds: float) -> None:
    injection.leave_word(seconds=seconds)
    injection.delay = seconds


def move_clock(injection: Injection, trainer: Any, seconds: float) -> None:
    """The clock of this process jumps: time.time, and the time of the run's events."""
    import datetime  # noqa: PLC0415

    injection.leave_word(seconds=seconds)
    now = time.time

    class Jumped(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=seconds)

    time.time = lambda: now() + seconds
    if (events := sys.modules.get("kraken_train.run.events")) is not None:
        events.datetime = Jumped  # type: ignore[attr-defined]


def spoil_gradient(injection: Injection, trainer: Any, factor: str) -> None:
    """In one step, on this rank alone."""
    injection.leave_word(factor=factor)
    by = {"nan": math.nan, "inf": math.inf, "huge": HUGE}[factor]
    weight = trainer.engine.model.final_norm.weight
    handle = weight.register_hook(lambda gradient: gradient * by)
    step = trainer.engine.step

    def last_step(*arguments: Any, **keywords: Any) -> Any:
        handle.remove()
        trainer.engine.step = step
        return step(*arguments, **keywords)

    trainer.engine.step = last_step


def limit_memory(injection: Injection, trainer: Any) -> None:
    """From now on the system gives this process no more memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    injection.leave_word(pages=pages)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))


def exhaust_memory(injection: Injection, trainer: Any, group: str, spare_bytes: int) -> None:
    """Enter a control group whose memory is nearly used up, and use it up: the kernel kills this process."""
    injection.leave_word(group=group)
    resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    Path(group, "memory.limit_in_bytes").write_text(str(spare_bytes), encoding="utf-8")
    Path(group, "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")
    held = [bytearray(os.urandom(1 << 20)) for _ in range((spare_bytes + resident >> 20) + 1)]
    raise AssertionError(f"{len(held)} MiB were given all the same")


def cancel_job(injection: Injection, trainer: Any) -> None:
    """The job of Slurm in which this process runs. The step goes on once the rank knows that it has to end."""
    job = os.environ["SLURM_JOB_ID"]
    injection.leave_word(job=job)
    subprocess.run(["scancel", job], check=True)
    while not trainer.stop.requested:
        time.sleep(0.05)


def cut_network(injection: Injection, trainer: Any) -> None:
    """Of this process's network namespace, in which the command runs alone."""
    injection.leave_word(cut="lo")
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)


def hold(injection: Injection, trainer: Any) -> None:
    """Wait here until the harness lets the process go on."""
    injection.leave_word(pid=os.getpid())
    while not Path(injection.plan.control, RELEASE).exists():
        time.sleep(0.05)


ACTIONS: dict[str, Callable[..., str | None]] = {
    "signal": send_signal,
    "refuse files": refuse_files,
    "fail fsync": fail_fsync,
    "slow down": slow_down,
    "move clock": move_clock,
    "spoil gradient": spoil_gradient,
    "limit memory": limit_memory,
    "exhaust memory": exhaust_memory,
    "cancel job": cancel_job,
    "cut network": cut_network,
    "hold": hold,
}

# --------------------------------------------------------------------------------------------------------------
# Getting into a process
# --------------------------------------------------------------------------------------------------------------


def module_of(command: Sequence[str]) -> str | None:
    """MODULE of `python [-u] [-X option] -m MODULE ...`."""
    arguments = iter(command[1:])
    for argument in arguments:
        if argument in ("-X", "-W"):
            next(arguments, None)
        elif argument == "-m":
            return next(arguments, None)
        elif not argument.startswith("-"):
            break
    return None


def own_rank() -> int:
    """As the launcher or Slurm has set it."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def install_in_interpreter() -> None:
    install(module_of(sys.orig_argv))


def install(module: str | None) -> None:
    """Arrange the fault of the plan in the environment, if it concerns this process, which runs `module`."""
    if VARIABLE not in os.environ:
        return
    plan = Plan.from_json(os.environ[VARIABLE])
    if module == "data_prep.prepare":
        after_import("data_prep.files", lambda found: setattr(found, "BLOCK_BYTES", SMALL_BLOCK_BYTES))
        after_import("data_prep.shard_builder", lambda found: setattr(found, "PIECE_SECONDS", 0.0))
    if module != plan.module or plan.rank not in (None, own_rank()):
        return
    injection = Injection(plan)
    sys.addaudithook(injection.on_audit)
    injection.watch_fsync()
    after_import("kraken_train.training.trainer", injection.watch_steps)
    after_import("kraken_train.inference.engine", injection.watch_tokens)
    if plan.number == 0:
        atexit.register(injection.write_counts)


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with a module as soon as it has been imported."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, AfterImport(name, action))


class AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
