"""With `deterministic=true`: train, save in the background, SIGTERM or SIGKILL, continue.

Both runs are compared with one that nothing has interrupted, bit for bit.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from types import ModuleType

from kraken_train.bench.stages.preset import RunRequest
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.stages.training_runs import new_run
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE


def measure(request: RunRequest, calls: ModuleType) -> Measured:
    settings = (*request.sizes.settings, "deterministic=true")
    request = replace(request, sizes=replace(request.sizes, settings=settings))
    run, killed, whole = (new_run(request, name) for name in ("interrupted", "killed", "whole"))
    with run.under_way() as process:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    stopped = max(run.losses())
    saved = run.last_saved()
    with killed.under_way() as process:
        process.kill()
        process.wait()
    before_kill = killed.losses()
    last = max(saved, killed.last_saved()) + request.sizes.steps
    run.finish(last, "resume=must")
    killed.finish(last, "resume=must")
    whole.finish(last)
    expected = whole.losses()
    pairs = [(run.losses()[step], loss) for step, loss in expected.items()]
    figures = {
        "exit code says interrupted": code == INTERRUPTED_EXIT_CODE,
        "steps lost by the interruption": stopped - saved,
        "same steps as without interruption": run.losses().keys() == expected.keys(),
        "largest relative difference of a loss": max(abs(ours / theirs - 1) for ours, theirs in pairs),
        "two runs: equal losses": all(expected[step] == loss for step, loss in before_kill.items() if step <= last),
        "after SIGTERM: equal losses": run.losses() == expected,
        "after SIGKILL: equal losses": killed.losses() == expected,
    }
    return Measured(figures, {"stopped after step": stopped, "killed after step": max(before_kill), "last step": last})
