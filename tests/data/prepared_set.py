"""Prepared folders whose tokens are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from data_prep.indexed import ShardWriter, bin_path
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, ShardEntry, SplitEntry, TokenizerEntry, probe_sha256
from kraken_train.common.files import file_sha256

VOCABULARY = "the pieces"


def write_set(
    folder: Path,
    tokens: dict[str, int],
    first: int = 0,
    dtype: str = "<u2",
    tokenizer: str = VOCABULARY,
    size: int = 500,
    text_bytes: int = 0,
) -> Path:
    """A prepared folder whose splits count up from `first`; `tokenizer` is the content of its file."""
    (folder / TOKENIZER_FOLDER).mkdir(parents=True)
    (folder / TOKENIZER_FOLDER / "tokenizer.model").write_text(tokenizer)
    (folder / TOKENIZER_FOLDER / "kraken_tokenizer.json").write_text(folder.name)  # may differ
    splits = {}
    for split, count in tokens.items():
        writer = ShardWriter(folder / f"{split}_00000", np.dtype(dtype))
        writer.append(np.arange(count) % 200 + first)
        written = writer.close()
        probe = probe_sha256(bin_path(writer.prefix))
        entry = ShardEntry(name=writer.prefix.name, **dataclasses.asdict(written), bin_probe_sha256=probe)
        splits[split] = SplitEntry([entry], text_bytes)
    files = {path.name: file_sha256(path) for path in (folder / TOKENIZER_FOLDER).iterdir()}
    Manifest(TokenizerEntry(folder.name, size, 1, files), np.dtype(dtype).name, splits, {}, {}).save(folder)
    return folder
