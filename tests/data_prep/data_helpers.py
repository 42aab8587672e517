"""Small corpora."""

from __future__ import annotations

import json
import random
from pathlib import Path

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
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
