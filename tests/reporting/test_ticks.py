"""Every axis of every figure that has a logarithmic one has at least three labelled ticks, however small its range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY, small_configs
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from data_prep.inspect import draw_histogram
from kraken_train.bench import topology_figure, transfer_figure
from kraken_train.bench.topology_row import QUANTITIES, Place
from kraken_train.common.ticks import MOST, ReadableLogLocator
from kraken_train.evaluation.results import Results
from kraken_train.reporting.comparison import Entry
from kraken_train.reporting.comparison_figure import draw_comparison
from kraken_train.reporting.curves import draw_curves
from kraken_train.reporting.norms_figure import draw_norms
from kraken_train.run.metrics import Run
from studies.architectures.comparison import Trained, at_equal_time
from studies.architectures.figure import draw

RANGES = [(0.58, 0.97), (2.1, 2.2), (3.0, 80.0), (1e-3, 4e4), (1.0, 1.0)]  # the smallest and the largest value
LOGARITHMIC = (  # all that has such an axis: a new one belongs here, and below
    "data_prep/inspect.py",
    "kraken_train/bench/topology_figure.py",
    "kraken_train/bench/transfer_figure.py",
    "kraken_train/reporting/comparison_figure.py",
    "kraken_train/reporting/curves.py",
    "kraken_train/reporting/norms_figure.py",
    "studies/architectures/figure.py",
)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return saved


def labels(axis: Axis) -> list[str]:
    """Of the ticks in sight."""
    low, high = sorted(axis.get_view_interval())
    of_ticks = [
        zip(locations, ticker.formatter.format_ticks(locations), strict=True)
        for ticker, locations in ((axis.major, axis.get_majorticklocs()), (axis.minor, axis.get_minorticklocs()))
    ]
    return [text for pairs in of_ticks for location, text in pairs if text and low <= location <= high]


def require_labels(figures: list[Figure], logarithmic: int) -> None:
    """On each axis; and so many of them, at least, are logarithmic."""
    (figure,) = figures
    found = 0
    for axes in figure.axes:
        if not (axes.get_visible() and axes.has_data()):
            continue
        for axis in (axes.xaxis, axes.yaxis):
            found += axis.get_scale() == "log"
            shown = labels(axis)
            assert len(shown) >= 3, (axes.get_title(loc="left"), axis.axis_name, axis.get_view_interval(), shown)
            assert len(set(shown)) == len(shown)
    assert found >= logarithmic


def between(smallest: float, largest: float, count: int = 12) -> list[float]:
    return [float(value) for value in np.geomspace(smallest, largest, count)]


@pytest.mark.parametrize("values", RANGES)
def test_curves(figures: list[Figure], values: tuple[float, float]) -> None:
    others = {"loss": 5.0, "lr": 1e-3, "tokens_per_second": 9e4}
    records = [{"step": step, "grad_norm": norm, **others} for step, norm in enumerate(between(*values))]
    draw_curves([Run("run", records)], Path("unused"))
    require_labels(figures, logarithmic=1)


def test_scores_of_suites(figures: list[Figure]) -> None:
    """Each task of each run has a line, of the steps that measured it; a run without scores has none."""
    keys = {"suite/superglue": 0.5, "suite/boolq": 0.6}
    others = {"loss": 5.0, "lr": 1e-3, "tokens_per_second": 9e4}
    runs = [
        Run(name, [{"step": step, "grad_norm": 1.0 + step, **others, **scores} for step in range(1, 9)])
        for name, scores in (("kraken", keys), ("gpt", keys), ("unmeasured", {}))
    ]
    draw_curves(runs, Path("unused"))
    ((*_, axes),) = [figure.axes for figure in figures]
    assert axes.get_title(loc="left") == "scores of suites"
    legend = axes.get_legend()
    assert legend is not None
    expected = [f"{run} {task}" for run in ("kraken", "gpt") for task in ("superglue 0.500", "boolq 0.600")]
    assert [text.get_text() for text in legend.get_texts()] == expected
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == len(expected)
    require_labels(figures, logarithmic=1)


@pytest.mark.parametrize("values", RANGES[::2])
def test_norms(figures: list[Figure], values: tuple[float, float]) -> None:
    kinds = ("weight", "update", "gain", "activation", "attention", "sum")
    names = [f"rms/{kind}/{place}" for kind in kinds for place in ("layer_0", "layer_1", "embedding")]
    records = [{"step": step, **dict.fromkeys(names, size)} for step, size in enumerate(between(*values))]
    draw_norms(Run("run", records), Path("unused"))
    require_labels([figure_without_colorbar(figures)], logarithmic=6)


def figure_without_colorbar(figures: list[Figure]) -> Figure:
    """Its ticks are layers, of which there may be two."""
    (figure,) = figures
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "layer, counted from 0"
    bar.set_visible(False)
    return figure


@pytest.mark.parametrize("perplexities", [(20.0, 21.0), (3.0, 900.0)])
def test_comparison(figures: list[Figure], perplexities: tuple[float, float]) -> None:
    about = {"data_fingerprint": "f", "split": "validation", "mode": "stream", "stride": 24, "dtype": "fp32"}
    entries = [
        Entry(name, Run(name, [{"step": 1, "loss": 5.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 9e4}]),
              small_configs()[name], 9, Results([{**about, "perplexity": perplexity, "loss": 1.0, "tokens": 9}]))
        for name, perplexity in zip(("kraken", "standard"), perplexities, strict=True)
    ]  # fmt: skip
    draw_comparison(entries, Path("unused"))
    require_labels(figures, logarithmic=2)


@pytest.mark.parametrize("growth", [1.02, 3.0])
def test_transfer(figures: list[Figure], growth: float) -> None:
    names = list(transfer_figure.PARAMETRIZATIONS)
    rows = [{"dimension": "width", "parametrization": name, "activation": "logits", "factor": factor,
             "change": growth**number} for name in names for number, factor in enumerate((1, 2, 4))]  # fmt: skip
    transfer_figure.draw_coordinates(rows, "title", Path("unused"))
    require_labels(figures, logarithmic=4)
    figures.clear()
    sweep = [{"model": model, "parametrization": name, "lr": lr, "loss": 1 + lr}
             for name in names for model in ("small", "width") for lr in (1e-3, 1e-3 * growth)]  # fmt: skip
    transfer_figure.draw_sweep(sweep, "small", 4, Path("unused"))
    require_labels(figures, logarithmic=1)


class TimeOfContext:
    def __init__(self, context: int) -> None:
        self.context = context

    def seconds(self, quantity: str) -> float:
        return 1 + 1 / self.context


@pytest.mark.parametrize("contexts", [(1024, 2048), (128, 512, 2048, 8192, 32768)])
def test_topology(figures: list[Figure], contexts: tuple[int, ...]) -> None:
    names = [field for field in Place.__dataclass_fields__ if field not in ("context", "interconnect")]
    places: Any = {
        Place(context=context, interconnect="free", **dict.fromkeys(names, 1)): {  # type: ignore[arg-type]
            name: TimeOfContext(context * factor) for name, factor in (("kraken", 1), ("standard", 2))
        }
        for context in contexts
    }
    topology_figure.draw(places, places, {"kraken": "C0", "standard": "C1"}, "standard", "title", Path("unused"))
    require_labels(figures, logarithmic=len(QUANTITIES))


@pytest.mark.parametrize("tokens", [(10**6, 18 * 10**5, 4 * 10**6), (5 * 10**8, 10**9, 2 * 10**9)])
def test_study_of_architectures(figures: list[Figure], tokens: tuple[int, ...]) -> None:
    model = small_configs()["kraken"]
    losses = {seed: {count: 5.0 - count / 1e10 + seed / 10 for count in tokens} for seed in range(2)}
    found = {"standard": Trained(model, 1e-3, losses), "kraken": Trained(model, 1e-3, losses)}
    timed = at_equal_time("s", found, {"standard": 6.0, "kraken": 5.0}, "here")
    draw({"s": found}, {"s": [timed]}, Path("unused"))
    require_labels(figures, logarithmic=2)


@pytest.mark.parametrize("longest", [3, 40, 100_000])
def test_lengths_of_documents(figures: list[Figure], longest: int) -> None:
    draw_histogram({"train": np.array([1, 2, longest])}, Path("unused"))
    require_labels(figures, logarithmic=2)


def test_no_figure_is_missing() -> None:
    files = [path for folder in ("kraken_train", "data_prep", "launch", "checkpoints", "studies")
             for path in (REPOSITORY / folder).rglob("*.py")]  # fmt: skip
    found = {str(path.relative_to(REPOSITORY)) for path in files
             if 'scale("log"' in path.read_text(encoding="utf-8")}  # fmt: skip
    assert found == set(LOGARITHMIC)


@pytest.mark.parametrize("base", [2, 10])
def test_few_round_ticks(base: int) -> None:
    locator = ReadableLogLocator(base)
    for low in np.geomspace(1e-6, 1e6, 10):
        for ratio in (1.0001, 1.01, 1.1, 1.9, 3.3, 25, 1e3, 1e12):
            ticks = locator.tick_values(low, low * ratio)
            assert 3 <= len(ticks) <= MOST + 2, (low, ratio, ticks)
            assert all(low <= tick <= low * ratio for tick in ticks)
    assert list(ReadableLogLocator(10).tick_values(0.5, 2000)) == [1, 10, 100, 1000]
    assert list(ReadableLogLocator(10).tick_values(0.6, 20)) == [1, 3, 10]
    assert list(ReadableLogLocator(2).tick_values(1, 8)) == [1, 2, 4, 8]
