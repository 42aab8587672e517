"""The figure of the times in vLLM: a panel for the first token and one for output tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kraken_train.bench.results import Case

Bar = tuple[Case, str, str, float]  # case, name, colour, seconds
TITLES = {"first_token": "time to the first token, ms", "output_token": "time per output token, ms"}
WAITING = "waiting"  # in the name of a Kraken whose ranks wait, which is hatched


def draw(bars: Mapping[str, Sequence[Bar]], title: str, path: Path) -> None:
    """By kind of time (`TITLES`) the bars of all cases, those of one case beside each other."""
    cases = list(dict.fromkeys(case for case, *_ in bars["first_token"]))
    figure = Figure(figsize=(max(7.0, 3.2 + 1.1 * len(cases)), 7.5), layout="constrained")
    for (kind, label), axes in zip(TITLES.items(), figure.subplots(2, 1), strict=True):
        names = list(dict.fromkeys(name for _, name, *_ in bars[kind]))
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            own = [(cases.index(case), color, seconds) for case, other, color, seconds in bars[kind] if other == name]
            places = [place + (index - (len(names) - 1) / 2) * width for place, *_ in own]
            shown = axes.bar(
                places,
                [1e3 * seconds for *_, seconds in own],
                width,
                color=[color for _, color, _ in own],
                hatch="///" if WAITING in name else None,
                edgecolor="white",
                label=name,
            )
            axes.bar_label(shown, [f"{1e3 * seconds:.3g}" for *_, seconds in own], fontsize=7, padding=2)
        axes.set_xticks(
            range(len(cases)), [f"{case.size.upper()}\n{case.context}\nx{case.degree}" for case in cases], fontsize=7
        )
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.axes[-1].set_xlabel("size of the model, tokens of the prompt, devices", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=140)
