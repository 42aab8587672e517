"""The results of a comparison of inference: labelled figures, geometric means, JSON and a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from kraken_train.bench.breakdown import HIDDEN, PARTS
from kraken_train.bench.grid import REFERENCE
from kraken_train.bench.timing import Figures, Rounds
from kraken_train.bench.variants import BLOCKING, OVERLAPPED, SILENT
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.layer_settings import LayerSettings

MEASURED, SIMULATED = "measured", "simulated"
SCALED, NOT_INTERLEAVED = "*", "†"  # marks, which the footnote explains
SPREAD = "medians of the rounds; ± is half the distance between the quartiles of their differences"


@dataclass(frozen=True)
class Case:
    """What is compared: one size at one prompt length on so many devices."""

    size: str
    context: int  # tokens
    degree: int  # devices

    def __str__(self) -> str:
        return f"{self.size.upper()}, {self.context} tokens, {self.degree} devices"


@dataclass(frozen=True)
class Result:
    """One architecture in one case."""

    case: Case
    model: ModelConfig
    figures: Figures
    scaled_from: tuple[int, ...] | None  # numbers of layers that were run, where not all were
    interleaved: bool  # with the other architectures, rather than after them
    kind: str  # MEASURED or SIMULATED, for all times that include communication

    @property
    def ttft(self) -> float:
        return float(np.median(self.figures.ttft[OVERLAPPED]))

    @property
    def compute(self) -> float:
        return float(np.median(self.figures.ttft[SILENT]))

    @property
    def exposed(self) -> Rounds:
        return self.figures.ttft[OVERLAPPED] - self.figures.ttft[SILENT]

    @property
    def hidden(self) -> Rounds:
        """The time that overlapping saves."""
        overlapped = self.figures.ttft[OVERLAPPED]
        return self.figures.ttft.get(BLOCKING, overlapped) - overlapped

    @property
    def output_token(self) -> float:
        return float(np.median(self.figures.output_token[OVERLAPPED]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; all times in seconds, each with its label, those of rounds with their quartiles."""

        def time(rounds: Rounds, kind: str = self.kind) -> dict[str, Any]:
            low, median, high = quartiles(rounds)
            return {"seconds": median, "low": low, "high": high, "kind": kind}

        def variants(of: Mapping[str, Rounds]) -> dict[str, Any]:
            return {
                variant: time(rounds, MEASURED if variant == SILENT else self.kind) for variant, rounds in of.items()
            }

        figures, traffic = self.figures, dict(self.figures.traffic)
        if self.kind == MEASURED:
            del traffic["seconds"]  # a real interconnect has no predicted time
        return {
            "size": self.case.size,
            "context": self.case.context,
            "devices": self.case.degree,
            "architecture": self.model.architecture,
            "num_layers": self.model.num_layers,
            "hidden_size": self.model.hidden_size,
            "head_dim": self.model.head_size,
            "layers": {field.name: getattr(self.model, field.name) for field in dataclasses.fields(LayerSettings)},
            "parameters": self.model.num_parameters,
            "scaled_from_layers": self.scaled_from,
            "interleaved": self.interleaved,
            "ttft": time(figures.ttft[OVERLAPPED]),
            "compute_alone": time(figures.ttft[SILENT], MEASURED),
            "exposed_communication": time(self.exposed),
            "hidden_communication": time(self.hidden),
            "ttft_variants": variants(figures.ttft),
            "time_per_output_token": time(figures.output_token[OVERLAPPED]),
            "time_per_output_token_variants": variants(figures.output_token),
            "asked_of_interconnect": {**traffic, "kind": self.kind},
            "breakdown": {part: {"seconds": figures.breakdown[part], "kind": self.kind} for part in (*PARTS, HIDDEN)},
            "attention_kernels": figures.attention_kernels,
        }


def quartiles(rounds: Rounds) -> tuple[float, float, float]:
    """(low, median, high)"""
    low, median, high = np.quantile(rounds, (0.25, 0.5, 0.75)).tolist()
    return low, median, high


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of positive numbers. Raises ValueError where there are none."""
    logs = [math.log(ratio) for ratio in ratios]
    if not logs:
        raise ValueError("the mean of no values is not defined")
    return math.exp(sum(logs) / len(logs))


def by_case(results: Iterable[Result]) -> dict[Case, dict[str, Result]]:
    cases: dict[Case, dict[str, Result]] = {}
    for result in results:
        cases.setdefault(result.case, {})[result.model.architecture] = result
    return cases


def speed_up(result: Result, standard: Result) -> float:
    """How much faster than the standard Transformer: 0.36 is +36%."""
    return standard.ttft / result.ttft - 1


def summarize(results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """Geometric means over all cases, by architecture; what compares is there if the standard one was run.

    The exposed share is 1 - 1 / (mean of time over compute alone), so that one free case does not make the mean 0.
    """
    cases = list(by_case(results).values())
    summary: dict[str, dict[str, Any]] = {}
    for name in cases[0]:
        own = [case[name] for case in cases]
        means: dict[str, Any] = {
            "exposed_share_of_ttft": {
                "value": 1 - 1 / geometric_mean(r.ttft / r.compute for r in own),
                "kind": own[0].kind,
            }
        }
        if REFERENCE in cases[0] and name != REFERENCE:
            pairs = [(case[name], case[REFERENCE]) for case in cases]
            means |= {
                "speed_up_over_standard": {
                    "value": geometric_mean(1 + speed_up(*pair) for pair in pairs) - 1,
                    "kind": own[0].kind,
                },
                "compute_over_standard_s": {
                    "value": geometric_mean(r.compute / standard.compute for r, standard in pairs),
                    "kind": MEASURED,
                },
                "output_token_speed_up_over_standard": {
                    "value": geometric_mean(standard.output_token / r.output_token for r, standard in pairs) - 1,
                    "kind": own[0].kind,
                },
            }
        summary[name] = means
    return summary


def summary_lines(results: Sequence[Result]) -> list[str]:
    lines = []
    for name, means in summarize(results).items():
        exposed = means["exposed_share_of_ttft"]
        line = f"{name}: {exposed['value']:.1%} of the first token's time is exposed communication ({exposed['kind']})"
        if "speed_up_over_standard" in means:
            faster, compute = means["speed_up_over_standard"], means["compute_over_standard_s"]
            line += (
                f", {faster['value']:+.1%} over the standard Transformer ({faster['kind']}), compute alone "
                f"{compute['value']:.3f} times the standard's ({compute['kind']})"
            )
        lines.append(line)
    return lines


def as_table(results: Iterable[Result], title: str) -> Table:
    cases = by_case(results)
    every = [result for case in cases.values() for result in case.values()]
    kind = every[0].kind
    table = Table(title=title, caption="\n".join(filter(None, (SPREAD, footnote(every)))))
    for name in ("size", "tokens", "devices", "architecture"):
        table.add_column(name, justify="left" if name in ("size", "architecture") else "right")
    for name, label in (
        ("first token, ms", kind),
        ("over standard", kind),
        ("compute alone, ms", MEASURED),
        ("exposed, ms", kind),
        ("hidden, ms", kind),
        ("output token, ms", kind),
    ):
        table.add_column(f"{name}\n({label})", justify="right")
    for case, architectures in cases.items():
        for name, result in architectures.items():
            standard = architectures.get(REFERENCE)
            table.add_row(
                case.size.upper() + marks(result),
                str(case.context),
                str(case.degree),
                name,
                milliseconds(result.ttft),
                "" if standard is None or name == REFERENCE else f"{speed_up(result, standard):+.1%}",
                milliseconds(result.compute),
                with_spread(result.exposed),
                with_spread(result.hidden) if result.model.overlaps_communication else "",
                milliseconds(result.output_token),
            )
        table.add_section()
    return table


def footnote(results: Iterable[Result]) -> str | None:
    """The explanation of the marks of these results."""
    results, lines = list(results), []
    scaled = sorted({result.scaled_from for result in results if result.scaled_from})
    if scaled:
        depths = "; ".join(" and ".join(map(str, depths)) for depths in scaled)
        lines.append(
            f"{SCALED} does not fit into memory: layers that were run ({depths}), extrapolated to the model's depth"
        )
    if not all(result.interleaved for result in results):
        lines.append(
            f"{NOT_INTERLEAVED} the models fit into memory only one by one: they ran one after the other, not in "
            "turns, so a change of the machine's speed is in the comparison"
        )
    return "\n".join(lines) or None


def marks(result: Result) -> str:
    return (SCALED if result.scaled_from else "") + ("" if result.interleaved else NOT_INTERLEAVED)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def with_spread(rounds: Rounds) -> str:
    """The median and half the distance between the quartiles, in milliseconds."""
    low, median, high = quartiles(rounds)
    return f"{milliseconds(median)} ± {milliseconds((high - low) / 2)}"
