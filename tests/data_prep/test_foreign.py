from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here, user_error

from data_prep.foreign import ForeignConfig, accept
from data_prep.indexed import HEADER, MAGIC, Shard, ShardWriter
from data_prep.tokenizers import Tokenizer, TokenizerSettings, build_tokenizer
from data_prep.verify import verify
from kraken_train.common.errors import DataError
from kraken_train.data.dataset import TrainingData, open_split


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "a kraken slept below the ice and nobody had woken it for many years "
    return build_tokenizer(
        TokenizerSettings(kind="sentencepiece", vocab_size=300), lambda: (f"{i} {text}" for i in range(50))
    )


@pytest.fixture(scope="module")
def model_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder / "tokenizer.model"


def documents(count: int, tokenizer: Tokenizer, seed: int = 0) -> list[list[int]]:
    """Random tokens, each document with its end."""
    rng = np.random.default_rng(seed)
    ends = [tokenizer.end_of_document]
    return [[int(i) for i in rng.integers(5, 300, rng.integers(1, 30))] + ends for _ in range(count)]


def write_nanogpt(path: Path, docs: list[list[int]], dtype: str = "<u2") -> None:
    path.parent.mkdir(exist_ok=True)
    np.array([token for doc in docs for token in doc], dtype).tofile(path)


def config(source: Path, output: Path, model: Path, kind: str = "nanogpt") -> ForeignConfig:
    settings = TokenizerSettings(kind="sentencepiece_model", path=str(model))
    return ForeignConfig(source=str(source), format=kind, output_dir=str(output), tokenizer=settings)


def test_nanogpt(tmp_path: Path, tokenizer: Tokenizer, model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs, held_out = documents(60, tokenizer), documents(9, tokenizer, seed=1)
    held_out[-1] = held_out[-1][:-1]  # as where nanoGPT cuts characters at a fraction
    write_nanogpt(tmp_path / "old" / "train.bin", docs)
    write_nanogpt(tmp_path / "old" / "val.bin", held_out)
    manifest = accept(config(tmp_path / "old", tmp_path / "new", model_file))
    for split, expected in (("train", docs), ("validation", held_out)):
        shard = Shard(tmp_path / "new" / f"{split}_00000")
        assert [shard.document(i).tolist() for i in range(shard.num_documents)] == expected
    assert (tmp_path / "new" / "train_00000.bin").samefile(tmp_path / "old" / "train.bin")  # not copied
    assert "its last document is without" in capsys.readouterr().out
    assert verify(tmp_path / "new").fingerprint == manifest.fingerprint  # an ordinary prepared folder
    assert accept(config(tmp_path / "old", tmp_path / "new", model_file)).fingerprint == manifest.fingerprint
    assert "already holds" in capsys.readouterr().out
    batch = TrainingData({tmp_path / "new": 1}).samples(8, seed=0).batch(range(3))
    assert batch.shape == (3, 9)


def test_what_the_tokenizer_would_not_give_is_told(
    tmp_path: Path, tokenizer: Tokenizer, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program may have encoded otherwise, so it is no error; a wrong tokenizer shows in it at once."""
    texts = ["a kraken slept", "nobody had woken it for years \U0001f991"]
    docs = [[*ids, tokenizer.end_of_document] for ids in tokenizer.encode_batch(texts)]
    for name, content in (("right", docs), ("wrong", [docs[0], *documents(9, tokenizer)])):
        write_nanogpt(tmp_path / name / "train.bin", content)
        accept(config(tmp_path / name, tmp_path / f"new {name}", model_file))
        verify(tmp_path / f"new {name}")
    printed = capsys.readouterr().out
    assert "of 2 documents encoded again, all have the same ids\n" in printed
    assert re.search(
        r"encoded again, \d have other ids than the tokenizer gives: train_00000: document \d: tok", printed
    )


def test_megatron(tmp_path: Path, tokenizer: Tokenizer, model_file: Path) -> None:
    """Several files, one of which has two sequences per document as Megatron's --split-sentences writes."""
    first, second, held_out = (documents(20, tokenizer, seed) for seed in range(3))
    old = tmp_path / "old"
    old.mkdir()
    for name, docs in (("corpus_1.text_document", first), ("val_corpus", held_out)):
        with ShardWriter(old / name, np.dtype("<i4")) as writer:
            for doc in docs:
                writer.append(doc)
    write_nanogpt(old / "corpus_2.bin", second, "<i4")
    lengths = np.array([part for doc in second for part in (1, len(doc) - 1)], "<i4")
    offsets = 4 * np.concatenate([[0], np.cumsum(lengths[:-1])]).astype("<i8")
    header = HEADER.pack(MAGIC, 1, 4, 40, 21)
    index = header + lengths.tobytes() + offsets.tobytes() + np.arange(0, 41, 2, dtype="<i8").tobytes()
    (old / "corpus_2.idx").write_bytes(index)
    manifest = accept(config(old, tmp_path / "new", model_file, "megatron"))
    assert manifest.dtype == "int32"
    assert verify(tmp_path / "new") == manifest
    shards = [Shard(tmp_path / "new" / entry.name) for entry in manifest.splits["train"].shards]
    assert [s.document(i).tolist() for s in shards for i in range(s.num_documents)] == first + second
    stream = open_split(tmp_path / "new", "validation")
    assert stream.read(0, len(stream)).tolist() == [token for doc in held_out for token in doc]
    alone = accept(config(old / "val_corpus.idx", tmp_path / "alone", model_file, "megatron"))
    assert list(alone.splits) == ["train"]
    assert alone.documents == 20


@pytest.mark.parametrize(("refused", "way"), [(("link",), "symbolically"), (("link", "symlink"), "copied")])
def test_where_links_are_not_possible(
    refused: tuple[str, ...],
    way: str,
    tmp_path: Path,
    tokenizer: Tokenizer,
    model_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    for name in refused:
        monkeypatch.setattr(os, name, fail)
    write_nanogpt(tmp_path / "old" / "train.bin", documents(5, tokenizer))
    accept(config(tmp_path / "old", tmp_path / "new", model_file))
    assert way in capsys.readouterr().out
    assert (tmp_path / "new" / "train_00000.bin").is_symlink() == (way == "symbolically")
    verify(tmp_path / "new")


def test_command(tmp_path: Path, tokenizer: Tokenizer, model_file: Path) -> None:
    write_nanogpt(tmp_path / "old" / "train.bin", documents(5, tokenizer))
    common = (f"source={tmp_path / 'old'}", f"output_dir={tmp_path / 'new'}")
    named = ("tokenizer=sentencepiece_model", f"tokenizer.path={model_file}")
    result = run_here("data_prep.foreign", *common, *named, "format=nanogpt")
    assert result.returncode == 0, result.stderr
    assert "5 documents" in result.stdout
    assert "note: there is no validation split" in result.stdout
    for arguments, message in (
        ((*common, *named), "format is not set"),
        ((*common, "format=nanogpt"), "tokenizer is not set; give tokenizer=VALUE"),
        ((*common, *named, "format=nemo"), "format=nemo is not known; use nanogpt or megatron"),
        ((*common, "tokenizer=sentencepiece", "format=nanogpt"), "tokenizer=sentencepiece would train a new one"),
    ):
        assert message in user_error(run_here("data_prep.foreign", *arguments))


def test_what_is_refused(tmp_path: Path, tokenizer: Tokenizer, model_file: Path) -> None:
    def refuses(source: Path, message: str, kind: str = "nanogpt") -> None:
        with pytest.raises(DataError, match=message):
            accept(config(source, tmp_path / "new", model_file, kind))
        assert not (tmp_path / "new").exists()

    old = tmp_path / "old"
    refuses(old, "is no folder")
    old.mkdir()
    refuses(old, "holds no train.bin")
    refuses(old, "holds no .idx file", "megatron")
    write_nanogpt(old / "train.bin", [[7, 8, 300, 9]])
    refuses(old, r"holds the token 300 at position 2, but the sentencepiece_model tokenizer has only .* to 299")
    (old / "train.bin").write_bytes(b"123")
    refuses(old, "has 3 bytes, an odd number")
    for name, dtype in (("a", "<u2"), ("b", "<i4")):
        with ShardWriter(old / name, np.dtype(dtype)) as writer:
            writer.append([1, 2])
    (old / "train.bin").unlink()
    refuses(old, "holds uint16 tokens and .*b.bin int32", "megatron")
    (old / "a.bin").unlink()
    refuses(old, "a.bin does not exist", "megatron")
    (old / "manifest.json").write_text("{}")
    refuses(old, "prepared data already")
