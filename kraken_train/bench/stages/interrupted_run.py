"""Train, save in the background, SIGTERM, continue: against a run that nothing has interrupted."""

from __future__ import annotations

import signal
from types import ModuleType

from kraken_train.bench.stages.preset import RunRequest
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.stages.training_runs import new_run
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE


def measure(request: RunRequest, calls: ModuleType) -> Measured:
    run, whole = new_run(request, "interrupted"), new_run(request, "whole")
    with run.under_way() as process:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    stopped = max(run.losses())
    saved = run.last_saved()
    last = saved + request.sizes.steps
    run.finish(last, "resume=must")
    whole.finish(last)
    pairs = [(run.losses()[step], loss) for step, loss in whole.losses().items()]
    figures = {
        "exit code says interrupted": code == INTERRUPTED_EXIT_CODE,
        "steps lost by the interruption": stopped - saved,
        "same steps as without interruption": run.losses().keys() == whole.losses().keys(),
        "largest relative difference of a loss": max(abs(ours / theirs - 1) for ours, theirs in pairs),
    }
    return Measured(figures, {"stopped after step": stopped, "last step": last})
