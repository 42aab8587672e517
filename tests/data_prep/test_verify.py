from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_texts, write_jsonl
from helpers import run_here, user_error

from data_prep import encoding, workers
from data_prep.indexed import Shard
from data_prep.manifest import Manifest, load_manifest, probe_sha256, verify_quick
from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizers import Tokenizer, load_tokenizer
from data_prep.verify import Content, verify
from data_prep.word_cache import SENTENCEPIECE_WORDS
from kraken_train.common.errors import DataError


@pytest.fixture
def data(config: Callable[..., PrepareConfig]) -> Path:
    prepare(config(shard_tokens=4000))
    return Path(config().output_dir)


def save_with(data: Path, **changes: object) -> None:
    """Change the first training shard's entry in the manifest, which is valid again afterwards."""
    manifest = load_manifest(data)
    shards = manifest.splits["train"].shards
    changed = dataclasses.replace(shards[0], **changes)  # type: ignore[arg-type]
    split = dataclasses.replace(manifest.splits["train"], shards=[changed, *shards[1:]])
    dataclasses.replace(manifest, splits={**manifest.splits, "train": split}).save(data)


def set_token(path: Path, position: int, token: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, 2 * position, token)
    path.write_bytes(content)


def test_good_data(data: Path, texts: list[str]) -> None:
    result = run_here("data_prep.verify", str(data))
    assert result.returncode == 0, result.stderr
    manifest: Manifest = load_manifest(data)
    lines = iter(result.stdout.splitlines())
    assert len(manifest.splits["train"].shards) > 2
    for name, split in manifest.splits.items():
        for entry in split.shards:
            assert next(lines) == f"{entry.name}: {entry.documents:,} documents, {entry.tokens:,} tokens, good"
        assert next(lines).startswith(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, content ")
    assert next(lines) == f"of {manifest.documents} documents encoded again, all have the same ids"
    for name, split in manifest.splits.items():
        for number in (0, split.documents // 2, split.documents - 1):
            sample = next(lines).removeprefix(f"{name} document {number} begins: ")
            assert any(repr(text[:200]) == sample for text in texts)
    assert manifest.fingerprint in next(lines)
    assert next(lines, None) is None


def test_content_does_not_depend_on_the_shards(data: Path, config: Callable[..., PrepareConfig]) -> None:
    def contents(folder: Path) -> list[str]:
        return [line for line in run_here("data_prep.verify", str(folder)).stdout.splitlines() if ", content " in line]

    other = config(shard_tokens=1000, output_dir=str(data.parent / "other"))
    assert prepare(other).fingerprint != load_manifest(data).fingerprint
    assert contents(data.parent / "other") == contents(data)
    content = Content("uint16")
    content.add_tokens(b"abcdef")
    content.add_lengths(np.array([1, 2]))
    for tokens, lengths, dtype in (
        (b"abcdef", [2, 1], "uint16"),
        (b"abcdeg", [1, 2], "uint16"),
        (b"abcdef", [1, 2], "int32"),
    ):
        different = Content(dtype)
        different.add_tokens(tokens)
        different.add_lengths(np.array(lengths))
        assert different.hexdigest() != content.hexdigest()


def test_one_byte_anywhere(config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    """Also where the quick check does not look, for which the shard must be larger than what that reads."""
    source = write_jsonl(tmp_path / "large.jsonl", make_texts(6000))
    prepare(config(source=str(source), output_dir=str(tmp_path / "large")))
    path = tmp_path / "large" / "train_00000.bin"
    content = path.read_bytes()
    unseen = 0
    for position in (0, 1, 4096 + 7, len(content) // 3, len(content) - 5000, len(content) - 1):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        message = user_error(run_here("data_prep.verify", str(tmp_path / "large")))
        assert f"{path} has other content than manifest.json lists" in message
        try:
            verify_quick(tmp_path / "large")
            unseen += 1
        except DataError:
            pass
    assert unseen > 0


@pytest.mark.parametrize("name", ["train_00001.bin", "train_00001.idx", "tokenizer/tokenizer.model", "manifest.json"])
def test_missing_file(data: Path, name: str) -> None:
    (data / name).unlink()
    assert name in user_error(run_here("data_prep.verify", str(data)))


def test_token_outside_the_vocabulary(data: Path) -> None:
    path = data / "train_00000.bin"
    set_token(path, 5, 330)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    save_with(data, bin_sha256=digest, bin_probe_sha256=probe_sha256(path))
    with pytest.raises(DataError, match=r"holds the token 330, but the tokenizer has only those from 0 to 329"):
        verify(data)


def words_apart(folder: Path) -> Tokenizer:
    """As before words were only looked up where that is exact: a run of unknown characters is cut where words are."""
    tokenizer = load_tokenizer(folder)
    tokenizer.words = SENTENCEPIECE_WORDS[0]
    return tokenizer


def test_other_ids_are_found(
    config: Callable[..., PrepareConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """When preparing, if the document is in the sample, and by `verify` in data of which all else is right."""
    texts = make_texts(300)
    texts[42] = "the sea 日本🦑日本 is deep"
    tokenizer = {"vocab_size": 80, "byte_fallback": False, "character_coverage": 0.98}
    source = write_jsonl(tmp_path / "unknown.jsonl", texts)
    settings = config(tokenizer, source=str(source), validation_fraction=0.0)
    with monkeypatch.context() as faulty:
        faulty.setattr(workers, "load_tokenizer", words_apart)
        faulty.setattr(encoding, "CHECKED_ONE_IN", 1)
        with pytest.raises(
            RuntimeError, match=r"unknown.jsonl:43: token \d+, after '.*', is 0, but .* this is a fault"
        ):
            prepare(settings)
        faulty.setattr(encoding.BlockEncoder, "_check", lambda *_: None)
        prepare(settings)
    data = Path(settings.output_dir)
    verify_quick(data)
    with pytest.raises(DataError, match=r"train_00000: document 42: token \d+, after '.*', is 0, but .*; prepare the"):
        verify(data)
    prepare(dataclasses.replace(settings, output_dir=str(tmp_path / "again")))
    capsys.readouterr()
    verify(tmp_path / "again")
    assert re.search(r"^of \d+ documents encoded again, all have the same ids$", capsys.readouterr().out, re.MULTILINE)


def test_manifest_with_other_counts(data: Path) -> None:
    tokens = load_manifest(data).splits["train"].shards[0].tokens
    save_with(data, tokens=tokens + 1)
    with pytest.raises(DataError, match=rf"and {tokens} tokens of uint16, but the manifest lists \d+ and {tokens + 1}"):
        verify(data)


def test_manifest_of_another_tokenizer(data: Path) -> None:
    manifest = load_manifest(data)
    dataclasses.replace(manifest, tokenizer=dataclasses.replace(manifest.tokenizer, vocab_size=400)).save(data)
    with pytest.raises(DataError, match="the manifest has vocab_size=400, but the tokenizer 330"):
        verify(data)


def test_manifest_with_other_totals(data: Path) -> None:
    path = data / "manifest.json"
    record = json.loads(path.read_text())
    record["totals"]["documents"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"states 201 documents in total, but its splits have 200"):
        verify(data)


def test_index_of_other_documents(data: Path) -> None:
    """It fits the tokens in number and is listed with its checksum, but its documents end elsewhere."""
    manifest, path = load_manifest(data), data / "train_00000.idx"
    shard = Shard(data / "train_00000")
    lengths = shard.lengths.copy()
    lengths[3:5] += [1, -1]
    offsets = 2 * np.concatenate([[0], np.cumsum(lengths[:-1], dtype="<i8")])
    index = path.read_bytes()[:34] + lengths.tobytes() + offsets.astype("<i8").tobytes() + shard.boundaries.tobytes()
    path.write_bytes(index)
    save_with(data, idx_sha256=hashlib.sha256(index).hexdigest())
    end = manifest.tokenizer.end_of_document
    with pytest.raises(DataError, match=rf"train_00000.bin: document 3 ends with the token \d+ and not with {end}"):
        verify(data)


def test_unusable_folders(tmp_path: Path) -> None:
    assert "does not exist" in user_error(run_here("data_prep.verify", str(tmp_path / "nowhere")))
    assert "holds no manifest.json" in user_error(run_here("data_prep.verify", str(tmp_path)))
