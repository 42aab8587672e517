"""What a comparison says: figures with their labels, their geometric means, JSON and a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kraken_train.bench.breakdown import HIDDEN, PARTS
from kraken_train.bench.timing import Figures
from kraken_train.bench.variants import BLOCKING, OVERLAPPED, SILENT
from kraken_train.config import ModelConfig

MEASURED, SIMULATED = "measured", "simulated"


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
    kind: str  # MEASURED or SIMULATED, of whatever has communication in it

    @property
    def ttft(self) -> float:
        return self.figures["ttft"][OVERLAPPED]

    @property
    def compute(self) -> float:
        return self.figures["ttft"][SILENT]

    @property
    def exposed(self) -> float:
        return self.ttft - self.compute

    @property
    def hidden(self) -> float:
        """What overlapping saves."""
        return self.figures["ttft"].get(BLOCKING, self.ttft) - self.ttft

    @property
    def output_token(self) -> float:
        return self.figures["output_token"][OVERLAPPED]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; all times in seconds, each with its label."""

        def time(seconds: float, kind: str = self.kind) -> dict[str, Any]:
            return {"seconds": seconds, "kind": kind}

        def variants(group: str) -> dict[str, Any]:
            return {
                variant: time(seconds, MEASURED if variant == SILENT else self.kind)
                for variant, seconds in self.figures[group].items()
            }

        parts, traffic = self.figures["breakdown"], dict(self.figures["traffic"])
        if self.kind == MEASURED:
            del traffic["seconds"]  # nobody has said what a real interconnect should take
        return {
            "size": self.case.size,
            "context": self.case.context,
            "devices": self.case.degree,
            "architecture": self.model.architecture,
            "num_layers": self.model.num_layers,
            "hidden_size": self.model.hidden_size,
            "head_dim": self.model.head_dim,
            "parameters": self.model.num_parameters,
            "scaled_from_layers": self.scaled_from,
            "interleaved": self.interleaved,
            "ttft": time(self.ttft),
            "compute_alone": time(self.compute, MEASURED),
            "exposed_communication": time(self.exposed),
            "hidden_communication": time(self.hidden),
            "ttft_variants": variants("ttft"),
            "time_per_output_token": time(self.output_token),
            "time_per_output_token_variants": variants("output_token"),
            "asked_of_interconnect": {**traffic, "kind": self.kind},
            "breakdown": {part: time(parts[part]) for part in (*PARTS, HIDDEN)},
        }


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of positive numbers. Raises ValueError where there are none."""
    logs = [math.log(ratio) for ratio in ratios]
    if not logs:
        raise ValueError("there is no mean of nothing")
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
        if "standard" in cases[0] and name != "standard":
            pairs = [(case[name], case["standard"]) for case in cases]
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
    table = Table(title=title, caption=footnote(every))
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
            standard = architectures.get("standard")
            table.add_row(
                case.size.upper() + ("*" if result.scaled_from else ""),
                str(case.context),
                str(case.degree),
                name,
                milliseconds(result.ttft),
                "" if standard is None or name == "standard" else f"{speed_up(result, standard):+.1%}",
                milliseconds(result.compute),
                milliseconds(result.exposed),
                milliseconds(result.hidden) if name == "kraken" else "",
                milliseconds(result.output_token),
            )
        table.add_section()
    return table


def footnote(results: Iterable[Result]) -> str | None:
    scaled = sorted({result.scaled_from for result in results if result.scaled_from})
    if not scaled:
        return None
    depths = "; ".join(" and ".join(map(str, depths)) for depths in scaled)
    return f"* does not fit into memory: layers that were run ({depths}), extrapolated to the model's depth"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
