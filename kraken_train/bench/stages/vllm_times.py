"""What a Kraken in vLLM gains where its sums run beside the attention, and its times beside the standard Transformer's.

Where vLLM is not installed the figures say so.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from kraken_train.bench.stages.preset import VllmSizes
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.stages.stage import Figures
from kraken_train.bench.vllm import Times, VllmConfig, models_of
from kraken_train.bench.vllm import measure as measure_times
from kraken_train.bench.vllm_jobs import require_vllm
from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError

LEAST_GAIN = "least time to the first token waiting over overlapped"


def measure(sizes: VllmSizes, calls: ModuleType) -> Measured:
    python = Path(sizes.python)
    try:
        version = require_vllm(python)
    except ConfigError as error:
        return Measured({LEAST_GAIN: str(error)})
    config = compose_command((*sizes.times, f"python={python}", f"degrees=[{sizes.ranks}]"), VllmConfig, "vllm")
    found = [times for served in models_of(config) for times in measure_times(config, served)]
    more = {"times": [times.to_dict() for times in found]}
    return Measured({"vLLM": version, **time_figures(found)}, more)


def time_figures(found: list[Times]) -> Figures:
    """Milliseconds of all, and what the Kraken gains where its sums run beside the attention."""
    figures: Figures = {}
    for times in found:
        title = f"{times.served.name}, {times.case}"
        figures[f"{title}: first token, ms"] = times.first_token[1] * 1e3
        figures[f"{title}: output token, ms"] = times.output_token[1] * 1e3
    overlapped = {
        times.case: times for times in found if times.served.model.overlaps_communication and times.served.overlap
    }
    gains = [
        times.first_token[1] / overlapped[times.case].first_token[1] for times in found if not times.served.overlap
    ]
    return figures | {LEAST_GAIN: min(gains)}
