"""Fixtures for all tests. This file also makes the folder importable, so that tests in subfolders import `helpers`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import run_module, save_tokenizer, small_tokenizer
from hypothesis import HealthCheck, settings

# Several processes of tests and their ranks share the processors. With a second thread small operations take half as
# much processor time again.
torch.set_num_threads(1)

# No time limits for hypothesis: machines differ in speed.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece tokenizer of 320 tokens."""
    return save_tokenizer(small_tokenizer(), tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def prepare_settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of data_prep.prepare for a small corpus, without output_dir."""
    source = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    texts = [f"Chapter {i}: " + " ".join(f"word{(i * j) % 37}" for j in range(60)) for i in range(150)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [f"source={source}", "tokenizer.vocab_size=320", "validation_fraction=0.1", "num_workers=0"]


@pytest.fixture(scope="session")
def data(prepare_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data for training commands."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    result = run_module("data_prep.prepare", *prepare_settings, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def books(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second set, prepared with the first one's tokenizer."""
    folder = tmp_path_factory.mktemp("books")
    texts = [f"Page {i}: " + " ".join(f"line{(i + j) % 23}" for j in range(90)) for i in range(60)]
    (folder / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = run_module(
        "data_prep.prepare",
        f"source={folder / 'books.jsonl'}",
        "tokenizer=sentencepiece_model",
        f"tokenizer.path={data / 'tokenizer' / 'tokenizer.model'}",
        "validation_fraction=0.2",
        f"output_dir={folder / 'data'}",
    )
    assert result.returncode == 0, result.stderr
    return folder / "data"
