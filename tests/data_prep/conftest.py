from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import PrepareConfig
from kraken_train.config import from_dict

WORDS = [
    "sea",
    "ship",
    "crew",
    "storm",
    "island",
    "rope",
    "sail",
    "wind",
    "harbour",
    "captain",
    "squid",
    "deep",
    "night",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + ".\n" for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


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
