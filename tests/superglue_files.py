"""Small sets in the schema of SuperGLUE, with made-up sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from helpers import TEXTS

DOCUMENTS = 20
WORDS = " ".join(TEXTS).split()


def sentence(*seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 6))


def superglue() -> dict[str, list[dict[str, Any]]]:
    """DOCUMENTS documents of each file."""

    def make(kind: int, i: int) -> dict[str, Any]:
        a, b, c, label = sentence(kind, i, 0), sentence(kind, i, 1), sentence(kind, i, 2), (i * 7 + kind) % 2
        return [
            {"question": a, "passage": b, "label": label},
            {"premise": a, "hypothesis": b, "label": i % 3},
            {"premise": a, "choice1": b, "choice2": c, "question": ("cause", "effect")[i % 2], "label": label},
            {"paragraph": a, "question": b, "answer": c, "label": label},
            {"passage": f"{a}\n@highlight\n{b}", "query": "Where @placeholder stood", "label": label,
             "entities": ["the mill", "a kraken", "the ice"], "answers": [["the mill", "the ice"][label]]},
            {"premise": a, "hypothesis": b, "label": label},
            {"word": "the", "sentence1": f"the {a}", "sentence2": f"the {b}", "start1": 0, "end1": 3, "start2": 0,
             "end2": 3, "label": label},
            {"text": f"Ann said that she {a}", "span1_index": 0, "span1_text": "Ann", "span2_index": 3,
             "span2_text": "she", "label": label},
        ][kind]  # fmt: skip

    files = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    return {name: [make(kind, i) | {"idx": i} for i in range(DOCUMENTS)] for kind, name in enumerate(files)}


def write_superglue(folder: Path) -> Path:
    folder.mkdir()
    for name, documents in superglue().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder
