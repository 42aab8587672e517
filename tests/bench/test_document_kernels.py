"""The comparison of kernels for attention within documents, as a command."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import run_here

from kraken_train.bench.documents import CAUSAL


def test_command(tmp_path: Path) -> None:
    output = tmp_path / "times.json"
    sizes = ("batch_size=2", "sub_layers=2", "num_heads=4", "num_kv_heads=2", "context_length=64", "document_tokens=20")
    result = run_here("kraken_train.bench.documents", *sizes, "rounds=2", "device=cpu", f"output={output}")
    assert result.returncode == 0, result.stderr
    times = json.loads(output.read_text())
    assert {name: sorted(found) for name, found in times.items()} == {
        CAUSAL: ["backward", "forward"],
        "mask": ["backward", "forward", "making"],
    }
