"""Started on several ranks: runs groups of checks and writes what they found as JSON; rank 0 writes.

Usage: run_ranks.py OUTPUT FOLDER CHECK[:ARGUMENT,...] ...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from kraken_train.parallel.ranks import read_runtime
from kraken_train.training.engine import start_processes, stop_processes
from parity import (
    checkpoint_matrix,
    communicator_checks,
    distillation,
    engine_modes,
    gradient_sums,
    late_sums,
    memory_checks,
    norms_checks,
    trajectories,
    uneven_vocabulary,
)


def main() -> None:
    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    runtime = read_runtime()
    start_processes(runtime)
    report: dict[str, object] = {"world_size": runtime.world_size}
    for check in sys.argv[3:]:
        name, _, argument = check.partition(":")
        values = argument.split(",") if argument else []
        sizes = [int(value) for value in values if value.isdigit()]
        started = time.monotonic()
        report[name] = {
            "modes": lambda sizes=sizes: engine_modes.run(runtime, sizes),
            "trajectories": lambda values=values: trajectories.run(runtime, values),
            "exchange": lambda sizes=sizes: communicator_checks.run(runtime, sizes),
            "distillation": lambda sizes=sizes: distillation.run(runtime, sizes),
            "events": lambda sizes=sizes: {
                str(size): communicator_checks.events(runtime, size, False, False) for size in sizes
            },
            "overlap": lambda sizes=sizes: communicator_checks.run_overlap(runtime, sizes[0], busy=False),
            "busy-overlap": lambda sizes=sizes: communicator_checks.run_overlap(runtime, sizes[0], busy=True),
            "late-sums": lambda: late_sums.run(runtime),
            "save": lambda sizes=sizes: checkpoint_matrix.save(runtime, sizes, folder, checkpoint_matrix.MODES),
            "save-more": lambda sizes=sizes: checkpoint_matrix.save(
                runtime, sizes, folder, checkpoint_matrix.MORE_MODES
            ),
            "resume": lambda sizes=sizes: checkpoint_matrix.resume(runtime, sizes, folder),
            "other-architectures": lambda: checkpoint_matrix.other_architectures(
                runtime, folder.with_name("checkpoints of other architectures")
            ),
            "uneven-vocabulary": lambda: uneven_vocabulary.run(runtime, folder.with_name("uneven vocabulary")),
            "norms": lambda values=values: norms_checks.run(runtime, values),
            "gradient-sums": lambda sizes=sizes: gradient_sums.run(runtime, sizes),
            "memory": lambda: memory_checks.run(runtime, quick=True),
            "more-memory": lambda: memory_checks.run(runtime, quick=False),
        }[name]()
        if runtime.is_first:
            print(f"{check}: {time.monotonic() - started:.1f} s", flush=True)
    if runtime.is_first:
        output.write_text(json.dumps(report), encoding="utf-8")
    stop_processes(runtime)


if __name__ == "__main__":
    main()
