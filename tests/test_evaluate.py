"""Perplexity: every token counts once, whatever the batch size."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    TEXTS,
    random_ids,
    random_windows,
    rough_model,
    run_here,
    run_module,
    small_configs,
    user_error,
    write_small_export,
)
from torch.nn import functional as F

from data_prep.manifest import TOKENIZER_FOLDER, load_manifest
from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizers import TokenizerSettings
from kraken_train.data import TokenStream, open_split, sequential
from kraken_train.perplexity import evaluate, perplexity, token_losses


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2000 tokens of 320, a fifth of them for validation."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"{i}: {TEXTS[i % 3]}"}) for i in range(90)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare(
        PrepareConfig(
            source=str(folder / "text.jsonl"),
            output_dir=str(folder / "data"),
            validation_fraction=0.2,
            tokenizer=TokenizerSettings(kind="sentencepiece", vocab_size=320),
        )
    )
    return folder / "data"


@pytest.mark.parametrize("architecture", ["kraken", "standard", "parallel"])
def test_sum_and_count(architecture: str) -> None:
    config = small_configs()[architecture]
    model, windows = rough_model(config), random_windows(config, 3, 10)
    total, count = token_losses(model, windows)
    ids = torch.from_numpy(windows)
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert count == 30
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert total / count == pytest.approx(model.loss(ids[:, :-1], ids[:, 1:]).item(), rel=1e-12)


@pytest.mark.parametrize("length", [2, 24, 25, 26, 130, 24 * 4 + 1])
def test_every_token_but_the_first_once(length: int) -> None:
    config = small_configs(context_length=24)["kraken"]
    model = rough_model(config)
    tokens = random_ids(config, 1, length)[0]
    stream = TokenStream([tokens.numpy().astype(np.uint16)])
    expected, start = 0.0, 0
    for position in range(1, length):  # one prediction at a time, from the start of its window
        start = (position - 1) // 24 * 24
        expected -= model(tokens[None, start:position])[0, -1].log_softmax(-1)[tokens[position]].item()
    results = [evaluate(model, sequential(stream, 24, batch_size)) for batch_size in (1, 2, 3, 64)]
    for result in results:
        assert result.tokens == length - 1
        assert result.loss == pytest.approx(expected / (length - 1), rel=1e-12)
        assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
        assert result.bits_per_byte is None


def test_bits_per_byte_and_large_losses() -> None:
    config = small_configs()["standard"]
    result = evaluate(rough_model(config), [random_windows(config, 2, 8)], text_bytes=50)
    assert result.bits_per_byte == pytest.approx(result.loss * 16 / math.log(2) / 50)
    assert perplexity(1000.0) == math.inf and math.isnan(perplexity(math.nan))


def test_command(data_dir: Path, tmp_path: Path) -> None:
    config = small_configs(vocab_size=320, context_length=32)["kraken"]
    model = write_small_export(tmp_path / "e", config, data_dir / TOKENIZER_FOLDER)
    arguments = [f"export_dir={tmp_path / 'e'}", f"data_dir={data_dir}", f"output={tmp_path / 'result.json'}"]
    result = run_module("kraken_train.evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    manifest = load_manifest(data_dir)
    text_bytes = manifest.splits["validation"].text_bytes
    expected = evaluate(model, sequential(open_split(data_dir, "validation"), 32, 5), text_bytes)
    assert written["tokens"] == expected.tokens == manifest.splits["validation"].tokens - 1
    for key in ("loss", "perplexity", "bits_per_byte"):
        assert written[key] == pytest.approx(dataclasses.asdict(expected)[key], rel=1e-6)
    assert written["split"] == "validation" and written["data_fingerprint"] == manifest.fingerprint
    for text in (f"{expected.perplexity:.1f}", f"{expected.tokens:,}", "bits per byte"):
        assert text in result.stdout


def test_data_that_do_not_fit(data_dir: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    def message(export: str, **settings: str) -> str:
        arguments = [f"{key}={value}" for key, value in {"data_dir": data_dir, **settings}.items()]
        return user_error(run_here("kraken_train.evaluate", f"export_dir={tmp_path / export}", *arguments))

    write_small_export(tmp_path / "small", small_configs(vocab_size=64)["kraken"], None)
    assert "has a vocabulary of 320 tokens" in message("small")
    write_small_export(tmp_path / "other", small_configs(vocab_size=320)["kraken"], tokenizer_dir)
    assert "prepared with another tokenizer" in message("other")
    assert "does not exist" in message("other", output=f"{tmp_path}/no/result.json")
