"""The memory of the best layouts by purpose, as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kraken_train.planning.prediction import Prediction
from kraken_train.planning.search import GB, describe

COLORS = {
    "weights": "#1b6ca8",
    "optimizer": "#5aa9e6",
    "gradients": "#e0a458",
    "activations": "#c8553d",
    "working": "#9a9a9a",
}


def draw(predictions: Sequence[Prediction], title: str, path: Path) -> None:
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(predictions)), layout="constrained")
    panel = figure.subplots()
    names = [f"{describe(p.layout)},\nmicro-batch {p.layout.micro_batch_size}" for p in predictions]
    left = [0.0] * len(predictions)
    for part, color in COLORS.items():
        values = [prediction.memory.parts[part] / GB for prediction in predictions]
        panel.barh(names, values, left=left, color=color, label=part)
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    panel.axvline(predictions[0].usable_bytes / GB, color="black", linestyle="--", linewidth=1, label="usable")
    panel.invert_yaxis()
    panel.set_xlabel("GB per device at the largest moment of a step")
    panel.tick_params(axis="y", labelsize=8)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(COLORS) + 1, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
