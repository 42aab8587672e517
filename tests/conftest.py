"""Fixtures for all tests. That this file is here also lets tests in subfolders import `helpers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import save_tokenizer, small_tokenizer
from hypothesis import HealthCheck, settings

# Examples may take as long as the machine needs.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece tokenizer of 320 tokens."""
    return save_tokenizer(small_tokenizer(), tmp_path_factory.mktemp("tokenizer") / "tokenizer")
