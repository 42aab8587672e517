"""Perplexity: every token is predicted once, independent of batch size and ranks."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import REPOSITORY, run_forked
from helpers import (
    TEXTS,
    launch_ranks,
    random_ids,
    random_windows,
    rough_model,
    run_here,
    run_module,
    small_configs,
    user_error,
    write_small_export,
)
from torch.nn.functional import cross_entropy

from checkpoints.exports.folder import read_export
from data_prep.indexed import Shard
from data_prep.manifest import TOKENIZER_FOLDER, load_manifest
from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizers import TokenizerSettings
from kraken_train.common.errors import CheckpointError
from kraken_train.data.dataset import TokenStream, open_split, sequential
from kraken_train.evaluate import record_in_export
from kraken_train.evaluation.perplexity import (
    Sequences,
    document_sequences,
    evaluate,
    perplexity,
    read_sequences,
    token_losses,
)
from kraken_train.evaluation.results import read_results
from kraken_train.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of about 2000 tokens with a vocabulary of 320; a fifth is for validation."""
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
    expected = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert count == 30
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert total / count == pytest.approx(model.loss(ids[:, :-1], ids[:, 1:]).item(), rel=1e-12)


def nats(model: LanguageModel, tokens: torch.Tensor, position: int, context: int) -> float:
    """The loss of tokens[position], predicted from tokens[context:position]."""
    return -model(tokens[None, context:position])[0, -1].log_softmax(-1)[tokens[position]].item()


@pytest.mark.parametrize(("length", "stride"), [(2, 24), (25, 7), (26, 7), (26, 24), (24 * 2 + 1, 24), (61, 7)])
def test_every_token_but_the_first_is_predicted_once(length: int, stride: int) -> None:
    config = small_configs(context_length=24)["kraken"]
    model = rough_model(config)
    tokens = random_ids(config, 1, length)[0]
    sequences = Sequences(TokenStream([tokens.numpy().astype(np.uint16)]), [(0, length)])
    expected = 0.0
    for position in range(1, length):
        windows_before = max(0, math.ceil((position - 24) / stride))  # the first window that contains it predicts it
        expected += nats(model, tokens, position, windows_before * stride)
    results = [evaluate(model, sequences, stride, batch_size) for batch_size in (1, 3, 64)]
    for result in results:
        assert result.tokens == length - 1
        assert result.loss == pytest.approx(expected / (length - 1), rel=1e-12)
        assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
        assert result.bits_per_byte is None


def test_each_document_from_its_start(data_dir: Path) -> None:
    manifest = load_manifest(data_dir)
    end = manifest.tokenizer.end_of_document
    config = small_configs(vocab_size=320, context_length=96)["standard"]
    model = rough_model(config)
    shard = Shard(data_dir / manifest.splits["validation"].shards[0].name)
    expected = 0.0
    for number in range(shard.num_documents):  # each fits into the context, so one forward pass predicts all of it
        tokens = torch.from_numpy(np.concatenate([[end], shard.document(number)]))[None, :-1]
        expected += cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum").item()
    text_tokens = shard.num_tokens - shard.num_documents
    text_bytes = manifest.splits["validation"].text_bytes
    sequences = read_sequences(data_dir, "validation", manifest, "documents")
    for batch_size in (1, 5, 100):
        result = evaluate(model, sequences, 48, batch_size, text_bytes)
        assert result.tokens == text_tokens  # with the first token of each document, without its end
        assert result.loss == pytest.approx(expected / text_tokens, rel=1e-12)
        assert result.bits_per_byte == pytest.approx(expected / math.log(2) / text_bytes, rel=1e-12)


def test_documents_without_an_end() -> None:
    stream = TokenStream([np.array([5, 6, 9, 7, 8]), np.array([3, 9])])
    lengths = np.array([3, 0, 2, 2])
    assert document_sequences(stream, lengths, 9)[1] == [
        (0, 3),
        (3, 5),
        (5, 7),
    ]  # as 8 is not the end token
    ended, spans = document_sequences(stream, np.array([3, 0, 4]), 9)
    assert [ended.read(*span).tolist() for span in spans] == [[9, 5, 6], [9, 7, 8, 3]]


def test_the_last_window_of_a_document_is_full() -> None:
    config = small_configs(context_length=24)["kraken"]
    model, tokens = rough_model(config), random_ids(config, 1, 61)[0]
    stream = TokenStream([tokens.numpy().astype(np.uint16)])
    expected = [nats(model, tokens, t, 0 if t <= 24 else 24 if t <= 48 else 36) for t in range(1, 61)]
    for batch_size in (1, 3):
        result = evaluate(model, Sequences(stream, [(0, 61)], reach_back=True), 24, batch_size)
        assert result.loss == pytest.approx(sum(expected) / 60, rel=1e-12)


def test_bits_per_byte_and_large_losses() -> None:
    config = small_configs()["standard"]
    sequences = Sequences(TokenStream([random_ids(config, 1, 17)[0].numpy()]), [(0, 17)])
    result = evaluate(rough_model(config), sequences, 24, 1, text_bytes=50)
    assert result.bits_per_byte == pytest.approx(result.loss * 16 / math.log(2) / 50)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_command(data_dir: Path, tmp_path: Path) -> None:
    config = small_configs(vocab_size=320, context_length=32)["kraken"]
    model = write_small_export(tmp_path / "e", config, data_dir / TOKENIZER_FOLDER)
    arguments = [f"export_dir={tmp_path / 'e'}", f"data_dir={data_dir}", f"output={tmp_path / 'result.json'}"]
    result = run_module("kraken_train.evaluate", *arguments, f"table={tmp_path / 'table.md'}")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    manifest = load_manifest(data_dir)
    windows = list(sequential(open_split(data_dir, "validation"), 32, 5))
    losses = [token_losses(model, batch) for batch in windows]
    loss, tokens = sum(nats for nats, _ in losses) / sum(n for _, n in losses), sum(n for _, n in losses)
    text_bytes = manifest.splits["validation"].text_bytes
    assert written["tokens"] == tokens == manifest.splits["validation"].tokens - 1
    assert written["loss"] == pytest.approx(loss, rel=1e-6)
    assert written["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert written["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / text_bytes, rel=1e-6)
    assert written["split"] == "validation"
    assert written["data_fingerprint"] == manifest.fingerprint
    for text in (f"{math.exp(loss):.1f}", f"{tokens:,}", "bits per byte"):
        assert text in result.stdout
    recorded = read_results(tmp_path / "e").perplexity
    assert [entry["loss"] for entry in recorded] == [written["loss"]]
    for text in ((tmp_path / "table.md").read_text(), (tmp_path / "e" / "README.md").read_text()):
        assert f"| {manifest.fingerprint[:12]} | validation | stream | 32 | {loss:.4f} |" in text


def test_evaluations_that_end_at_the_same_time(tmp_path: Path) -> None:
    """No entry of two processes is lost, neither in the export's file nor in its card."""
    folder, script, each = tmp_path / "e", tmp_path / "record.py", 12
    write_small_export(folder, small_configs()["kraken"], None)
    script.write_text(
        textwrap.dedent("""
        import pathlib, sys
        from checkpoints.exports.folder import read_export
        from kraken_train.evaluate import record_in_export
        folder, first, count = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
        export = read_export(folder)
        pathlib.Path(f"{folder}-{first}").touch()
        while len(list(folder.parent.glob(f"{folder.name}-*"))) < 2:
            pass
        entry = {"data_fingerprint": "a" * 64, "split": "validation", "mode": "stream", "dtype": "fp32", "loss": 2.0,
                 "perplexity": 7.4, "tokens": 9, "bits_per_byte": None}
        for stride in range(first, first + count):
            record_in_export(export, {**entry, "stride": stride}, {})
    """)
    )
    programs = [[str(script), str(folder), str(first), str(each)] for first in (1, 1 + each)]
    results = run_forked(programs, [{"PYTHONPATH": str(REPOSITORY)}] * 2)
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    strides = list(range(1, 1 + 2 * each))
    assert sorted(entry["stride"] for entry in read_results(folder).perplexity) == strides
    rows = (folder / "README.md").read_text().splitlines()
    assert sorted(int(row.split(" | ")[3]) for row in rows if "| validation | stream |" in row) == strides


def test_an_export_that_was_removed_meanwhile(tmp_path: Path) -> None:
    write_small_export(tmp_path / "e", small_configs()["kraken"], None)
    export = read_export(tmp_path / "e")
    shutil.rmtree(export.folder)
    with pytest.raises(CheckpointError, match="/e cannot be written: No such file or directory"):
        record_in_export(export, {"loss": 2.0}, {})


def test_ranks_and_batches_do_not_change_the_result(data_dir: Path, tmp_path: Path) -> None:
    write_small_export(tmp_path / "e", small_configs(vocab_size=320, context_length=32)["kraken-gqa"], None)

    def arguments(batch_size: int, output: str) -> list[str]:
        return [f"export_dir={tmp_path / 'e'}", f"data_dir={data_dir}", "mode=documents", "dtype=fp64", "record=false",
                "stride=5", f"batch_size={batch_size}", f"output={tmp_path / output}"]  # fmt: skip

    assert run_here("kraken_train.evaluate", *arguments(7, "one.json")).returncode == 0
    launch_ranks(2, "-m", "kraken_train.evaluate", *arguments(2, "two.json"))
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-12)
    for name in ("perplexity", "bits_per_byte"):
        assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-12)
    assert two == one
    assert not (tmp_path / "e" / "evaluation.json").exists()


def test_errors(data_dir: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    def message(export: str, **settings: str) -> str:
        arguments = [f"{key}={value}" for key, value in {"data_dir": data_dir, **settings}.items()]
        return user_error(run_here("kraken_train.evaluate", f"export_dir={tmp_path / export}", *arguments))

    write_small_export(tmp_path / "small", small_configs(vocab_size=64)["kraken"], None)
    assert "has a vocabulary of 320 tokens" in message("small")
    write_small_export(tmp_path / "other", small_configs(vocab_size=320)["kraken"], tokenizer_dir)
    assert "prepared with another tokenizer" in message("other")
    assert "does not exist" in message("other", output=f"{tmp_path}/no/result.json")
    assert "use at most 24" in message("small", stride="25", data_dir=str(data_dir))
    assert "mode=words is not known" in message("small", mode="words")
    assert "there is nothing to evaluate" in message("small", data_dir="null")
    assert "tasks=['boolq'] needs a suite" in message("small", tasks="[boolq]")
