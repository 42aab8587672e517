"""The figure of the ledger: what each change of a Kraken does to its perplexity, and where the GPT is."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kraken_train.reporting.curves import save
from studies.results import Result, differences
from studies.spread import standard_error
from studies.study import Run

GPT, KRAKEN = "gpt-3m", "kraken-3m"
CHOSEN = ("ffn_reads_stream=true", "ffn_reads_stream=true outer_size=192 ffn_hidden_size=184")
COLORS = {GPT: "#444444", **{f"{KRAKEN} {changes}": "#d1495b" for changes in CHOSEN}}
LABEL_WIDTH = 60  # characters


def draw(arms: Sequence[str], results: Mapping[Run, Result], path: Path) -> None:
    """Each arm's perplexity against the Kraken of the same seeds, best first. Raises DataError."""
    models = [arm for arm in dict.fromkeys(arms) if arm.split()[0] in (GPT, KRAKEN) and "optim." not in arm]
    found = {arm: differences(results, arm, KRAKEN) for arm in models if arm != KRAKEN}
    ordered = sorted((arm for arm in found if found[arm]), key=lambda arm: statistics.mean(found[arm]), reverse=True)
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(ordered):
        values, color = found[arm], COLORS.get(arm, "#4a7fb5")
        mean, error = percent(statistics.mean(values)), 100 * (standard_error(values) or 0.0)
        axes.plot([0, mean], [place, place], color=color, linewidth=1, alpha=0.5)
        axes.errorbar(mean, place, xerr=error, color=color, marker="o", markersize=5, capsize=2)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [textwrap.fill(arm.removeprefix(f"{KRAKEN} "), LABEL_WIDTH) for arm in ordered]
    axes.set_yticks(range(len(ordered)), labels, fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"validation perplexity against that of {KRAKEN},\nsame seeds (%); less is better")
    save(figure, path)


def percent(difference: float) -> float:
    """A difference of losses, in nats, as one of perplexities."""
    return 100 * math.expm1(difference)
