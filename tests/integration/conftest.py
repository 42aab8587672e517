"""Data for the training commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_module


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = folder / "corpus.jsonl"
    texts = [f"Chapter {i}: " + " ".join(f"word{(i * j) % 37}" for j in range(60)) for i in range(150)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = folder / "data"
    result = run_module(
        "data_prep.prepare",
        f"source={source}",
        "tokenizer.vocab_size=320",
        "validation_fraction=0.1",
        f"output_dir={output}",
    )
    assert result.returncode == 0, result.stderr
    return output
