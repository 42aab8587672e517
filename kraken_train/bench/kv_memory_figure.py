"""The figure of `kraken_train.bench.kv_memory`: weights and key-value cache side by side for every choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kraken_train.bench.memory_row import GIB, MemoryRow

SHADES = {"mha": 1.0, "gqa": 0.7, "mqa": 0.4}  # of the cache, by form of attention
WEIGHTS = "#9a9a9a"


def draw(rows: Sequence[MemoryRow], colors: Mapping[str, str], heads_per_kv_head: int, title: str, path: Path) -> None:
    """One panel per batch and context; in it a group per degree, and in that a bar per model and form of attention.

    `colors` are those of the architectures; `heads_per_kv_head` is the most that grouped-query attention was allowed.
    """
    batch_sizes = sorted({row.batch_size for row in rows})
    contexts = sorted({row.context for row in rows})
    degrees = sorted({row.degree for row in rows})
    kinds = list(dict.fromkeys((row.architecture, row.attention) for row in rows))
    figure = Figure(figsize=(5.5 * len(contexts) + 1, 3.4 * len(batch_sizes) + 1.2), layout="constrained")
    panels = figure.subplots(len(batch_sizes), len(contexts), squeeze=False)
    width = 0.85 / len(kinds)
    for line, batch_size in zip(panels, batch_sizes, strict=True):
        for panel, context in zip(line, contexts, strict=True):
            for row in rows:
                if (row.batch_size, row.context) != (batch_size, context):
                    continue
                place = degrees.index(row.degree) + width * (
                    kinds.index((row.architecture, row.attention)) - (len(kinds) - 1) / 2
                )
                weights, cache = row.weights / GIB, row.cache / GIB
                panel.bar(place, weights, width * 0.92, color=WEIGHTS)
                colour = (colors[row.architecture], SHADES[row.attention])
                panel.bar(place, cache, width * 0.92, bottom=weights, color=colour)
                total = f"{weights + cache:.3g}"
                panel.annotate(total, (place, weights + cache), ha="center", va="bottom", fontsize=7, rotation=90,
                               xytext=(0, 2), textcoords="offset points")  # fmt: skip
            panel.set_title(f"{batch_size} sequence{'s' if batch_size > 1 else ''} of {context:,} tokens", fontsize=10)
            panel.set_xticks(range(len(degrees)), [f"{degree} devices" for degree in degrees])
            panel.margins(y=0.16)
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
        line[0].set_ylabel("GiB per device")
    legend = [Patch(color=WEIGHTS, label="weights")]
    forms = {"gqa": f"gqa ({heads_per_kv_head} heads per key-value head)"}
    legend += [
        Patch(color=(colors[architecture], SHADES[form]), label=f"{architecture}, {forms.get(form, form)}: cache")
        for architecture, form in kinds
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
