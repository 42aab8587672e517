"""Text and data for these tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_here


@pytest.fixture(scope="session")
def prepare_settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A preparation, but for its output_dir."""
    source = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    texts = [f"Chapter {i}: " + " ".join(f"word{(i * j) % 37}" for j in range(60)) for i in range(150)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [f"source={source}", "tokenizer.vocab_size=320", "validation_fraction=0.1", "num_workers=0"]


@pytest.fixture(scope="session")
def data(prepare_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    result = run_here("data_prep.prepare", *prepare_settings, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder
