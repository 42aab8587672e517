from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_texts, write_jsonl

from data_prep.prepare import PrepareConfig
from kraken_train.common.settings import from_dict


@pytest.fixture
def texts() -> list[str]:
    return make_texts(200)


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Callable[..., PrepareConfig]:
    """A small preparation; keywords change settings, `tokenizer` only the given ones."""

    def make(tokenizer: dict[str, Any] | None = None, **changes: Any) -> PrepareConfig:
        settings: dict[str, Any] = {
            "source": str(corpus),
            "output_dir": str(tmp_path / "data"),
            "validation_fraction": 0.1,
            "tokenizer": {"kind": "sentencepiece", "vocab_size": 330} | (tokenizer or {}),
        }
        return from_dict(settings | changes, PrepareConfig)

    return make
