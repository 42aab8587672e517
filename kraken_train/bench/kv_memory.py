"""Memory for serving, per device: python -m kraken_train.bench.kv_memory output_dir=FOLDER

Kraken's sub-layers together are wider than the standard layer that they match, and so is their key-value cache. This
shows its memory by degree, context and batch, and the memory that sharing key-value heads saves: within a sub-layer a
shared head stays on its device, while a standard Transformer on more devices than it has key-value heads
must hold the same ones more than once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kraken_train.bench.grid import SIZES, architectures, model_config, require_axis
from kraken_train.bench.kv_memory_figure import draw
from kraken_train.bench.memory_row import GIB, MemoryRow
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.inference.kv_cache import KeyValueCache
from kraken_train.inference.loading import served_config, share_model
from kraken_train.inference.memory import free_memory, serving_memory
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.registry import build_model
from kraken_train.parallel.device import DEVICES, choose_device
from kraken_train.parallel.sharding import UnitRange

FORMS = ("mha", "gqa", "mqa")  # multi-head, grouped-query, multi-query attention
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class KVMemoryConfig:
    """See conf/kv_memory.yaml."""

    architectures: tuple[str, ...]  # values of model.architecture, which docs/models.md lists
    sizes: tuple[str, ...]  # tiny, 1.3b, 6.7b, 13b, 65b, 175b: of the standard Transformer that a Kraken matches
    attention: tuple[str, ...]  # multi-head, grouped-query, multi-query
    degrees: tuple[int, ...]  # devices that share a model, and sub-layers of the Kraken
    contexts: tuple[int, ...]  # tokens of each sequence
    batch_sizes: tuple[int, ...]  # sequences
    # of grouped-query attention; the heads of a Kraken are chosen so that this number, or a divisor of it, divides them
    heads_per_kv_head: int
    vocab_size: int  # rows of the embedding
    dtype: str  # bfloat16 | float32
    device: str  # auto | cpu | cuda; on a GPU one device's share is also allocated and measured, where it fits
    output_dir: FilePath  # folder for kv_memory.json and kv_memory.png

    def validate(self) -> None:
        """Raises ConfigError."""
        for name, known in (("architectures", architectures()), ("sizes", tuple(SIZES)), ("attention", FORMS)):
            require_axis(name, getattr(self, name))
            for value in getattr(self, name):
                require_choice(name, value, known)
        for name in ("degrees", "contexts", "batch_sizes"):
            require_axis(name, getattr(self, name))
            for value in getattr(self, name):
                require_positive(name, value)
        require_positive("heads_per_kv_head", self.heads_per_kv_head)
        require_positive("vocab_size", self.vocab_size)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("device", self.device, DEVICES)


def model_with(config: KVMemoryConfig, size: str, degree: int, architecture: str, form: str) -> ModelConfig:
    """The model of a form of attention.

    For grouped-query attention a Kraken's dimensions are chosen so that `heads_per_kv_head` divides its heads, or if
    that is impossible the largest divisor of it that does: never a coarser sharing than the standard one's, which would
    flatter its cache. Raises ConfigError.
    """
    plain = (architecture, SIZES[size], degree, config.vocab_size, max(config.contexts))
    model = model_config(*plain)
    if form != "gqa":
        return share_heads(model, model.heads if form == "mqa" else 1)
    for sharing in range(config.heads_per_kv_head, 1, -1):
        if config.heads_per_kv_head % sharing == 0:
            with suppress(ConfigError):  # no such width; perhaps with less sharing
                shared = model_config(*plain, heads_multiple=sharing)
                if shared.heads % sharing == 0:
                    return share_heads(shared, sharing)
    return share_heads(model, 1)


def share_heads(model: ModelConfig, heads_per_kv_head: int) -> ModelConfig:
    return model.with_kv_heads(model.heads // heads_per_kv_head)


def first_share(
    config: KVMemoryConfig, size: str, degree: int, architecture: str, form: str
) -> tuple[ModelConfig, ModelConfig, UnitRange]:
    """The model, the model as `degree` equal devices serve it, and the units on the first, which has most."""
    model = model_with(config, size, degree, architecture, form)
    units = share_model(model, [1.0] * degree)[0]
    return model, served_config(model, units), units


def compute(config: KVMemoryConfig) -> list[MemoryRow]:
    """A row for each configuration."""
    rows = []
    for size, degree, architecture, form in itertools.product(
        config.sizes, config.degrees, config.architectures, config.attention
    ):
        model, served, units = first_share(config, size, degree, architecture, form)
        one = serving_memory(served, units, 1, 1, DTYPES[config.dtype])
        rows += [
            MemoryRow(
                architecture, size, form, model.kv_heads, model.heads // model.kv_heads, degree, context,
                batch_size, one.weights, one.cache * context * batch_size,
            )
            for context, batch_size in itertools.product(config.contexts, config.batch_sizes)
        ]  # fmt: skip
    return rows


def measure(rows: list[MemoryRow], config: KVMemoryConfig, device: torch.device) -> list[MemoryRow]:
    """The rows with what the allocator says that weights and cache take; rows that do not fit stay as they are."""
    measured = []
    models = itertools.groupby(rows, key=lambda row: (row.size, row.degree, row.architecture, row.attention))
    for which, of_model in models:
        alike = list(of_model)
        if alike[0].weights > free_memory(device):
            measured += alike
            continue
        _, served, units = first_share(config, *which)
        before = torch.cuda.memory_allocated(device)
        with torch.device("meta"):
            model = build_model(served, units=units)
        model = model.to(DTYPES[config.dtype]).to_empty(device=device)
        weights = torch.cuda.memory_allocated(device) - before
        for row in alike:
            cache = None
            if row.cache < free_memory(device):
                held = KeyValueCache(model, row.batch_size, row.context)
                cache = torch.cuda.memory_allocated(device) - before - weights
                del held
            measured.append(dataclasses.replace(row, measured_weights=weights, measured_cache=cache))
        del model
        torch.cuda.empty_cache()
    return measured


def as_table(rows: list[MemoryRow], label: str) -> Table:
    """One line per model, form and degree, a column for the cache of each batch and context."""
    table = Table(title="Memory per device, GiB", caption=label)
    for name in ("size", "devices", "model", "attention", "kv heads", "heads per\nkv head", "weights"):
        table.add_column(name, justify="right")
    loads = list(dict.fromkeys((row.batch_size, row.context) for row in rows))
    for batch_size, context in loads:
        table.add_column(f"cache\n{batch_size} x {context}", justify="right")
    models = itertools.groupby(rows, key=lambda row: (row.size, row.degree, row.architecture, row.attention))
    for (size, degree, architecture, form), of_model in models:
        alike = {(row.batch_size, row.context): row for row in of_model}
        first = alike[loads[0]]
        caches = [f"{alike[load].cache / GIB:.2f}" for load in loads]
        sharing = str(first.kv_heads), str(first.heads_per_kv_head)
        table.add_row(size, str(degree), architecture, form, *sharing, f"{first.weights / GIB:.2f}", *caches)
    return table


def measure_memory(config: KVMemoryConfig) -> None:
    device = choose_device(config.device)
    output_dir = Path(config.output_dir)
    open_output(output_dir)
    rows = compute(config)
    label = f"computed for {config.dtype}"
    if device.type == "cuda":
        rows = measure(rows, config, device)
        count = sum(row.measured_cache is not None for row in rows)
        label += f"; {count} of {len(rows)} also measured on one {torch.cuda.get_device_name(device)}"
    Console(width=None if Console().is_terminal else 160).print(as_table(rows, label))
    record = {"label": label, "settings": asdict(config), "rows": [asdict(row) for row in rows]}
    (output_dir / "kv_memory.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for size in config.sizes:
        path = output_dir / f"kv_memory_{size}.png"
        title = f"{size}: memory per device, {label}"
        models = (first_share(config, size, config.degrees[0], name, "mha")[0] for name in config.architectures)
        colors = {model.architecture: model.color for model in models}
        draw([row for row in rows if row.size == size], colors, config.heads_per_kv_head, title, path)
        print(f"drawn: {path}")


def main() -> None:
    run_entry(measure_memory, KVMemoryConfig, "kv_memory")


if __name__ == "__main__":
    main()
