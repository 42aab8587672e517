"""The figures of a comparison: speed-up bars with their geometric means, and the time by operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kraken_train.bench.breakdown import ATTENTION, EXPOSED, GEMM, HEAD, HIDDEN, IDLE, NORM, OTHER, PARTS
from kraken_train.bench.grid import REFERENCE
from kraken_train.bench.results import Case, Result, by_case, footnote, geometric_mean, marks, speed_up

PART_COLORS = {
    GEMM: "#2b4c7e", ATTENTION: "#5b8fb9", NORM: "#9fc5a8", OTHER: "#e3d5a4", HEAD: "#b39bc8", EXPOSED: "#d1495b",
    IDLE: "#d9d9d9",
}  # fmt: skip
PART_LABELS = {
    GEMM: "matrix products", ATTENTION: "attention", NORM: "norms", OTHER: "other (element-wise)", HEAD: "head",
    EXPOSED: "exposed AllReduce", IDLE: "idle", HIDDEN: "hidden AllReduce (beside the time)",
}  # fmt: skip


def draw_speed_ups(results: Sequence[Result], title: str, path: Path) -> None:
    """Bars of how much faster than the standard Transformer, case by case, and their geometric means."""
    cases = by_case(results)
    names = [name for name in next(iter(cases.values())) if name != REFERENCE]
    figure = Figure(figsize=(max(7.0, 3.2 + 0.55 * len(cases)), 5.2), layout="constrained")
    axes = figure.subplots()
    colors = {name: result.model.color for name, result in next(iter(cases.values())).items()}
    width = 0.8 / len(names)
    places = [*range(len(cases)), len(cases) + 0.6]  # the mean stands apart
    for index, name in enumerate(names):
        ratios = [1 + speed_up(case[name], case[REFERENCE]) for case in cases.values()]
        heights = [100 * (ratio - 1) for ratio in (*ratios, geometric_mean(ratios))]
        offset = (index - (len(names) - 1) / 2) * width
        bars = axes.bar([place + offset for place in places], heights, width, color=colors[name], label=name)
        axes.bar_label(bars, [f"{height:+.0f}" for height in heights], fontsize=7, padding=2)
    axes.set_xticks(places, [*(short_label(case, of[names[0]]) for case, of in cases.items()), "geometric\nmean"],
                    fontsize=7)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(len(cases) - 0.2, color="grey", linewidth=0.6, linestyle=":")
    axes.set_ylabel("faster to the first token than\nthe standard Transformer, %")
    axes.set_xlabel("size of the model, tokens of the prompt, devices", fontsize="small")
    axes.margins(x=0.01, y=0.12)
    axes.legend(frameon=False)
    finish(figure, axes, title, results, path)


def draw_breakdowns(results: Sequence[Result], title: str, path: Path) -> None:
    """For each context and number of devices a panel: the parts of each architecture's time, the standard's being 100.

    Hidden communication stands hatched on top of the time, to which it adds nothing.
    """
    cases = by_case(results)
    panels = sorted({(case.context, case.degree) for case in cases})
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    most = max(sum((case.context, case.degree) == panel for case in cases) for panel in panels)
    figure = Figure(figsize=(columns * max(5.5, 1.9 + 1.25 * most), 1.2 + 3.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for (context, degree), axes in zip(panels, grid.flat, strict=False):
        own = {case: of for case, of in cases.items() if (case.context, case.degree) == (context, degree)}
        draw_panel(axes, own)
        axes.set_title(f"prompt of {context} tokens, {degree} devices", loc="left", fontsize="medium")
    handles = [Patch(color=PART_COLORS[part], label=PART_LABELS[part]) for part in PARTS]
    handles.append(Patch(facecolor="white", edgecolor=PART_COLORS[EXPOSED], hatch="////", label=PART_LABELS[HIDDEN]))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    finish(figure, None, title, results, path)


def draw_panel(axes: Axes, cases: dict[Case, dict[str, Result]]) -> None:
    ticks: list[tuple[float, str]] = []
    middles: list[tuple[float, str]] = []
    place = 0.0
    for case, architectures in cases.items():
        reference = architectures.get(REFERENCE, next(iter(architectures.values())))
        unit = sum(reference.figures.breakdown[part] for part in PARTS) / 100
        middles.append((place + (len(architectures) - 1) / 2, case.size.upper() + marks(reference)))
        for name, result in architectures.items():
            parts, bottom = result.figures.breakdown, 0.0
            for part in PARTS:
                axes.bar(place, parts[part] / unit, 0.82, bottom, color=PART_COLORS[part])
                bottom += parts[part] / unit
            hidden = parts[HIDDEN] / unit
            if hidden > 0:
                axes.bar(place, hidden, 0.82, bottom, facecolor="none", edgecolor=PART_COLORS[EXPOSED], hatch="////",
                         linewidth=0.5)  # fmt: skip
            axes.text(place, bottom + hidden + 1.5, f"{result.ttft * 1e3:.3g}", ha="center", fontsize=7)
            ticks.append((place, name))
            place += 1
        place += 0.7
    axes.set_xticks([p for p, _ in ticks], [name for _, name in ticks], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=7)  # fmt: skip
    sizes = axes.secondary_xaxis("top")
    sizes.set_xticks([p for p, _ in middles], [name for _, name in middles], fontsize="small")
    sizes.tick_params(length=0)
    sizes.spines["top"].set_visible(False)
    axes.set_ylabel("time, % of the standard's;\nabove the bars: ms to the first token", fontsize="small")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.spines[["top", "right"]].set_visible(False)


def short_label(case: Case, result: Result) -> str:
    return f"{case.size.upper()}{marks(result)}\n{case.context}\nx{case.degree}"


def finish(figure: Figure, axes: Axes | None, title: str, results: Iterable[Result], path: Path) -> None:
    if axes is not None:
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    note = footnote(results)
    figure.suptitle(title if note is None else f"{title}\n{note}", fontsize="medium")
    figure.savefig(path, dpi=140)
