"""A rank is killed in the middle of a training on several: the others must end, say so, and the run must go on."""

from __future__ import annotations

import time
from types import ModuleType

import psutil

from kraken_train.bench.stages.preset import RunRequest
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.stages.training_runs import PATIENCE, new_run


def measure(request: RunRequest, calls: ModuleType) -> Measured:
    run = new_run(request, "lost")
    with run.under_way() as process:
        started = psutil.Process(process.pid).children(recursive=True)
        rank_process(started, request.ranks - 1).kill()
        begin = time.monotonic()
        code = process.wait(PATIENCE)
        seconds = time.monotonic() - begin
        left = [other for other in started if other.is_running() and other.status() != psutil.STATUS_ZOMBIE]
    ended = run.events("ended")
    saved = run.last_saved()
    run.finish(saved + request.sizes.steps, "resume=must")
    figures = {
        "the job fails": code != 0,
        "no process is left": not left,
        "seconds until all ranks have ended": seconds,
        "continued to its end": max(run.losses()) == saved + request.sizes.steps,
        "recorded reason": str(ended[-1].get("reason")) if ended else "none",
    }
    return Measured(figures)


def rank_process(processes: list[psutil.Process], rank: int) -> psutil.Process:
    """Raises RuntimeError where no process has this rank."""
    for process in processes:
        try:
            if process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue  # it is over, or it is not ours
    raise RuntimeError(f"none of the {len(processes)} processes of the launcher has RANK={rank}")
