"""The figure of `kraken_train.bench.throughput`: the time of a token by phase, and tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kraken_train.bench.throughput_results import PHASES, Result
from kraken_train.parallel.step_timer import BACKWARD, DATA, EXCHANGE, FORWARD, OPTIMIZER, OTHER, REDUCTION

PHASE_COLORS = {
    DATA: "#b39bc8", FORWARD: "#9fc5a8", BACKWARD: "#2b4c7e", EXCHANGE: "#d1495b", REDUCTION: "#e08e45",
    OPTIMIZER: "#5b8fb9", OTHER: "#d9d9d9",
}  # fmt: skip
PHASE_LABELS = {EXCHANGE: "exposed communication", REDUCTION: "reduction of gradients"}


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """A line for each result, the first on top."""
    figure = Figure(figsize=(11.5, 1.9 + 0.45 * len(results)), layout="constrained")
    times, speeds = figure.subplots(1, 2, sharey=True)
    places = range(len(results))
    left = [0.0] * len(results)
    for name in PHASES:
        # Seconds per token in milliseconds per 1,000 tokens.
        widths = [result.phases[name] / result.tokens * 1e6 for result in results]
        if any(widths):
            times.barh(places, widths, 0.7, left, color=PHASE_COLORS[name], label=PHASE_LABELS.get(name, name))
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    times.set_yticks(places, [str(result.entry) for result in results], fontsize=8)
    times.invert_yaxis()
    times.set_xlabel("milliseconds per 1,000 tokens")
    bars = speeds.barh(
        places,
        [result.tokens_per_second for result in results],
        0.7,
        color=[result.entry.model.color for result in results],
    )
    labels = [f"{result.tokens_per_second:,.0f}  ({result.to_reference.median:.2f} x)" for result in results]
    speeds.bar_label(bars, labels, fontsize=8, padding=3)
    speeds.set_xlabel(f"tokens per second (x: relative to {results[0].entry})")
    speeds.margins(x=0.3)
    for axes in (times, speeds):
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=130)
