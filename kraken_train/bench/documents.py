"""Time of attention within documents, by kernel: python -m kraken_train.bench.documents

Each kernel of `kraken_train.model.documents` computes the attention of one layer, forward and backward, over the same
random documents, in turns, next to causal attention over whole samples. What is made once for a micro-batch, a mask or
the like, is timed apart.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kraken_train.common.cli import run_entry
from kraken_train.common.files import replace_synced
from kraken_train.common.free_text import FilePath
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.model.documents import KERNELS, Documents
from kraken_train.model.layers import AttentionScope, attend_causally
from kraken_train.parallel.device import DEVICES, choose_device

CAUSAL = "causal, whole samples"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
END = 0


@dataclass(frozen=True)
class DocumentsConfig:
    """See conf/documents.yaml."""

    batch_size: int  # samples
    sub_layers: int  # of a Kraken on this device, whose samples are further rows of the attention; 1 for a GPT
    num_heads: int  # heads of a sub-layer
    num_kv_heads: int  # key-value heads of a sub-layer
    head_dim: int  # values of a head
    context_length: int  # tokens of a sample
    document_tokens: float  # mean length of the documents; their ends are drawn at random
    dtype: str  # bfloat16 | float32
    rounds: int  # of all kernels in turns; times are medians
    device: str  # auto | cpu | cuda; a CPU has the mask only
    output: FilePath | None  # JSON file to write; null: none

    def validate(self) -> None:
        """Raises ConfigError."""
        for name in (
            "batch_size", "sub_layers", "num_heads", "num_kv_heads", "head_dim", "context_length", "document_tokens",
            "rounds",
        ):  # fmt: skip
            require_positive(name, getattr(self, name))
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("device", self.device, DEVICES)


Times = dict[str, dict[str, float]]  # kernel -> what -> seconds


def measure(config: DocumentsConfig, device: torch.device) -> Times:
    """Medians over the rounds, after one that does not count."""
    dtype, rows = DTYPES[config.dtype], config.sub_layers * config.batch_size
    torch.manual_seed(0)
    ids = (torch.rand(config.batch_size, config.context_length, device=device) > 1 / config.document_tokens).long()
    begins = Documents.of(ids, END).begins
    inputs = [
        torch.randn(rows, config.context_length, heads, config.head_dim, device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in (CAUSAL, *usable(device, dtype))}
    for _ in range(config.rounds + 1):
        for name, found in seconds.items():
            found.append(one_round(name, begins, config.sub_layers, inputs))
    return {
        name: {what: statistics.median(of_round[what] for of_round in found[1:]) for what in found[0]}
        for name, found in seconds.items()
    }


def usable(device: torch.device, dtype: torch.dtype) -> list[str]:
    if device.type != "cuda":
        return ["mask"]
    return [name for name in KERNELS if name != "varlen" or dtype == torch.bfloat16]


def one_round(name: str, begins: Tensor, sub_layers: int, inputs: list[Tensor]) -> dict[str, float]:
    times: dict[str, float] = {}
    attend: Callable[..., Tensor] = attend_causally
    if name != CAUSAL:
        store, times["making"] = timed(begins.device, lambda: KERNELS[name](begins, sub_layers, inputs[0].dtype))
        attend = store.attend
    mixed, times["forward"] = timed(begins.device, lambda: attend(*inputs))
    _, times["backward"] = timed(begins.device, lambda: mixed.backward(torch.ones_like(mixed)))
    return times


def timed(device: torch.device, work: Callable[[], AttentionScope | Tensor | None]) -> tuple[Any, float]:
    """Seconds until the device has done it too."""
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def measure_documents(config: DocumentsConfig) -> None:
    device = choose_device(config.device)
    times = measure(config, device)
    table = Table(title=f"Attention of a layer, milliseconds ({device.type})")
    for column in ("kernel", "making, once a micro-batch", "forward", "backward"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, found in times.items():
        cells = [f"{found[what] * 1000:.3f}" if what in found else "" for what in ("making", "forward", "backward")]
        table.add_row(name, *cells)
    Console(width=100).print(table)
    if config.output is not None:
        replace_synced(Path(config.output), json.dumps(times, indent=1) + "\n")


def main() -> None:
    run_entry(measure_documents, DocumentsConfig, "documents")


if __name__ == "__main__":
    main()
