"""Runs one program of the stages, for `kraken_train.bench.acceptance`:

    python -m kraken_train.bench.stages.program NAME OUTPUT DEVICE SETTINGS

Under torchrun every rank runs it, and the first one writes OUTPUT: {"figures": {...}, "more": {...}}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kraken_train.bench.stages.preset import (
    CPU,
    CurveSizes,
    MachineSizes,
    ParitySizes,
    RunRequest,
    StepSizes,
    VllmSizes,
)
from kraken_train.bench.stages.stage import Figures
from kraken_train.common.files import replace_synced
from kraken_train.common.settings import from_dict

# The module with `measure(settings, calls)`, and what its settings are.
PROGRAMS: dict[str, type] = {
    "machine": MachineSizes,
    "kernels": StepSizes,
    "interrupted_run": RunRequest,
    "curve": CurveSizes,
    "parity": ParitySizes,
    "overlap": StepSizes,
    "lost_rank": RunRequest,
    "one_visible": RunRequest,
    "vllm_tokens": VllmSizes,
    "vllm_times": VllmSizes,
}


@dataclass(frozen=True)
class Measured:
    figures: Figures
    more: Any = None  # what is kept in the file but not in the table


def calls_for(device: str) -> ModuleType:
    return importlib.import_module(f"kraken_train.bench.stages.{'cpu' if device == CPU else 'cuda'}_calls")


def main() -> None:
    name, output, device, settings = sys.argv[1:]
    program = importlib.import_module(f"kraken_train.bench.stages.{name}")
    measured: Measured = program.measure(from_dict(json.loads(settings), PROGRAMS[name]), calls_for(device))
    if os.environ.get("RANK", "0") == "0":
        record = {"figures": measured.figures, "more": measured.more}
        replace_synced(Path(output), json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
