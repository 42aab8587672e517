"""The results of a comparison of training speed: figures, ratios, JSON and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from kraken_train.bench.memory_row import GIB
from kraken_train.bench.throughput_config import DEEPSPEED, TORCH, Entry
from kraken_train.bench.throughput_run import Measured
from kraken_train.model.flops import attention_flops_per_token, matrix_flops_per_token
from kraken_train.parallel.step_timer import BACKWARD, DATA, EXCHANGE, FORWARD, OPTIMIZER, OTHER, REDUCTION

PHASES = (DATA, FORWARD, BACKWARD, EXCHANGE, REDUCTION, OPTIMIZER, OTHER)
CAPTION = (
    "times: the median round; ratios: medians over the rounds, ± half the distance between their quartiles; MFU: model "
    "FLOPs of matrices + causal attention; exchange: all-reduces between ranks that no computation hides"
)


@dataclass(frozen=True)
class Ratio:
    """Of two tokens per second in each round."""

    median: float
    low: float  # quartiles
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {(self.high - self.low) / 2:.2f}"


@dataclass(frozen=True)
class Result:
    entry: Entry
    measured: Measured
    tokens: int  # per step, over all ranks
    ranks: int
    peak_flops: float | None  # of all devices together, per second
    to_reference: Ratio

    @property
    def seconds(self) -> float:
        return self.measured.median_round.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of a step, of the median round; they sum to `seconds`."""
        return {name: self.measured.median_round.phases.get(name, 0.0) for name in PHASES}

    @property
    def mfu(self) -> dict[str, float] | None:
        """Fractions of the devices' peak that the model's FLOPs reach; None where the peak is not known."""
        if self.peak_flops is None:
            return None
        per_second = self.tokens_per_second / self.peak_flops
        matrix = matrix_flops_per_token(self.entry.model) * per_second
        attention = attention_flops_per_token(self.entry.model) * per_second
        return {"total": matrix + attention, "matrix": matrix, "attention": attention}

    def to_dict(self) -> dict[str, Any]:
        model = self.entry.model
        low, high = np.quantile(self.measured.seconds, (0.25, 0.75)).tolist()
        return {
            "model": self.entry.name,
            "engine": self.entry.engine,
            "architecture": model.architecture,
            "parameters": model.num_parameters,
            "hidden_size": model.hidden_size,
            "head_dim": model.head_size,
            "context_length": model.context_length,
            "tokens_per_step": self.tokens,
            "step_seconds": {"median": self.seconds, "low": low, "high": high},
            "phase_seconds": self.phases,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": self.tokens_per_second / self.ranks,
            "flops_per_token": {
                "matrix": matrix_flops_per_token(model),
                "attention": attention_flops_per_token(model),
            },
            "mfu": self.mfu,
            "peak_memory": {"bytes": self.measured.peak_bytes, "kind": self.measured.memory_kind},
            "to_reference": vars(self.to_reference),
            "rounds": [{"seconds": part.seconds, "phases": dict(part.phases)} for part in self.measured.rounds],
        }


def make_results(
    measured: Mapping[Entry, Measured], tokens: Mapping[Entry, int], ranks: int, peak_flops: float | None
) -> list[Result]:
    """In the order of `measured`, the reference first."""
    first = next(iter(measured))
    return [
        Result(entry, of, tokens[entry], ranks, peak_flops, ratio(of, measured[first], tokens[entry] / tokens[first]))
        for entry, of in measured.items()
    ]


def ratio(of: Measured, reference: Measured, tokens: float = 1.0) -> Ratio:
    """Of tokens per second; a step of the first one has `tokens` times the other's."""
    low, median, high = np.quantile(tokens * reference.seconds / of.seconds, (0.25, 0.5, 0.75)).tolist()
    return Ratio(median, low, high)


def engine_costs(results: Sequence[Result]) -> dict[str, Ratio]:
    """For each model that both engines have trained: seconds of a step with DeepSpeed over those in plain PyTorch."""
    by_engine = {(result.entry.name, result.entry.engine): result.measured for result in results}
    return {
        name: ratio(by_engine[name, TORCH], of)
        for (name, engine), of in by_engine.items()
        if engine == DEEPSPEED and (name, TORCH) in by_engine
    }


def as_table(results: Sequence[Result], title: str) -> Table:
    kind = results[0].measured.memory_kind
    table = Table(title=title, caption=f"{CAPTION}; memory: {kind}")
    table.add_column("model")
    for name in ("parameters", "head\ndim", "tokens/s", f"over\n{results[0].entry}", "ms per\nstep"):
        table.add_column(name, justify="right")
    shown = [name for name in PHASES if any(result.phases[name] >= 5e-4 * result.seconds for result in results)]
    for name in shown:
        table.add_column(name, justify="right")
    for name in ("MFU", "GiB"):
        table.add_column(name, justify="right")
    for result in results:
        mfu, peak = result.mfu, result.measured.peak_bytes
        table.add_row(
            str(result.entry),
            f"{result.entry.model.num_parameters / 1e6:.1f}M",
            str(result.entry.model.head_size),
            f"{result.tokens_per_second:,.0f}",
            str(result.to_reference),
            f"{result.seconds * 1e3:.1f}",
            *(f"{result.phases[name] * 1e3:.1f}" for name in shown),
            "" if mfu is None else f"{mfu['matrix']:.1%} + {mfu['attention']:.1%}",
            "" if peak is None else f"{peak / GIB:.2f}",
        )
    return table
