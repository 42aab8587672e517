"""One launch per number of ranks serves all checks: starting ranks is what takes the time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from filelock import FileLock
from helpers import launch_ranks

from parity import run_ranks

Report = dict[str, Any]

SLOW_RANKS = 6  # more than the cores of a small machine
GRIDS = {  # checks by number of ranks; a number of a check is the ranks per model copy
    1: ["modes:1", "trajectories:kraken-4/1/plain,kraken-4/1/muon,kraken-4/1/mup,parallel/1/muon-bf16-zero2", "save:1"],
    2: [
        "modes:1,2",
        "trajectories:kraken-4/2/plain,kraken-6/2/plain,kraken-4/2/compile,kraken-4/2/compile-recompute-bf16,"
        "kraken-4/2/z-loss-vocab,uneven-vocabulary/2/vocab-by-default,uneven-vocabulary/2/muon-bf16-vocab,kraken-4/2/mup,kraken-4/1/mup-bf16-zero2-vocab,kraken-4/2/compile-recompute-apart,"
        "standard/2/compile,parallel/2/zero2-recompute-vocab,kraken-6/2/muon-bf16,standard/1/muon-zero2-recompute-vocab",
        "exchange:2",
        "overlap:2",
        "late-sums",
        "distillation:2",
        "resume:1,2",
        "gradient-sums:1",
        "norms:kraken-4/2/muon,ladder/2/plain",
        "memory",
    ],
    4: [
        "trajectories:kraken-4/1/plain,kraken-4/2/plain,kraken-4/4/plain,kraken-4/2/zero2-recompute-vocab,"
        "kraken-4/4/bf16-vocab,kraken-4/2/bf16-zero2-recompute-fp32sums,"
        "uneven-vocabulary/4/bf16-vocab,kraken-4/4/apart,standard/4/plain,ladder/4/plain,fal/4/plain,track/4/plain,standard/2/bf16-vocab,parallel/2/plain,parallel/4/zero2-recompute-vocab,"
        "kraken-4/1/muon,kraken-4/2/muon-zero2-recompute-vocab,kraken-4/4/muon-bf16-zero2,"
        "standard-modern/2/muon,standard/4/muon-bf16,parallel/2/muon-bf16-zero2,parallel/4/muon",
        "exchange:2,4",
        "distillation:4",
        "save:2,4",
        "resume:2",
        "uneven-vocabulary",
        "gradient-sums:1,2",
        "memory",
    ],
    SLOW_RANKS: [
        "trajectories:kraken-6/2/plain,kraken-6/3/plain,kraken-6/6/plain,kraken-6/3/zero2-recompute-vocab,"
        "kraken-6/3/muon"
    ],
}
SLOW = {  # the other half of the checkpoint matrix; and an attention that computes
    "slow 1": (1, ["save-more:1"]),
    "slow 4": (4, ["save-more:2,4", "resume:2,4", "norms:kraken-4/2/zero2-recompute-vocab"]),
    "slow 2": (
        2,
        [
            "resume:1,2",
            "busy-overlap:2",
            "norms:kraken-4/1/zero2-recompute-vocab,uneven-vocabulary/2/bf16-vocab",
        ],
    ),
    "slow resume at 1": (1, ["resume:1"]),
    "slow rivals": (
        4,
        [
            "trajectories:track-modern/2/muon-bf16,fal-modern/2/muon-bf16,ladder-modern/2/bf16-zero2-recompute-fp32sums,"
            "ladder/2/compile,fal/2/compile,track/2/compile",
            "norms:track/2/plain,fal/2/plain,standard/2/compile,kraken-4/2/compile-recompute-bf16",
            "other-architectures",
        ],
    ),
    **{f"slow memory {ranks}": (ranks, ["more-memory"]) for ranks in (1, 2, 4)},
}
LAUNCHES = {**{ranks: (ranks, checks) for ranks, checks in GRIDS.items()}, **SLOW}
RESUMES_FROM: dict[int | str, tuple[int | str, ...]] = {
    4: (1,),
    2: (1, 4),
    "slow 4": ("slow 1",),
    "slow 2": ("slow 1", "slow 4"),
    "slow resume at 1": ("slow 1", "slow 4"),
}


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """`launched(name)`: what the ranks of one of LAUNCHES found.

    The processes of `pytest -n 2` share the launches: the first that needs one makes it, and the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "parity"
    folder.mkdir(exist_ok=True)
    reports: dict[int | str, Report | Exception] = {}

    def launch(what: int | str) -> Report:
        """Once, whether it succeeds or fails."""
        if what not in reports:
            try:
                reports[what] = start(what)
            except Exception as error:
                reports[what] = error
        report = reports[what]
        if isinstance(report, Exception):
            raise report
        return report

    def start(what: int | str) -> Report:
        for before in RESUMES_FROM.get(what, ()):
            launch(before)
        ranks, checks = LAUNCHES[what]
        output = folder / f"{what}.json"
        with FileLock(folder / f"{what}.lock"):
            if not output.is_file():
                checkpoints = folder / ("slow checkpoints" if what in SLOW else "checkpoints")
                checkpoints.mkdir(exist_ok=True)
                launch_ranks(ranks, str(run_ranks.__file__), str(output), str(checkpoints), *checks)
        report = json.loads(output.read_text())
        assert report["world_size"] == ranks
        return report

    return launch
