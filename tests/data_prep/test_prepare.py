from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_helpers import make_texts, write_jsonl
from helpers import wait_for_stop
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.indexed import Shard, ShardWriter
from data_prep.manifest import Manifest, verify_quick
from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizers import load_tokenizer
from kraken_train.common.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
Configure = Callable[..., PrepareConfig]


def decoded(data: Path, split: str) -> list[str]:
    """The documents of a split, through the files alone; each must end with the end-of-document token."""
    manifest = verify_quick(data)
    tokenizer = load_tokenizer(data / "tokenizer")
    documents = []
    for entry in manifest.splits[split].shards:
        shard = Shard(data / entry.name)
        assert (shard.num_documents, shard.num_tokens) == (entry.documents, entry.tokens)
        for i in range(shard.num_documents):
            ids = shard.document(i)
            assert ids[-1] == tokenizer.end_of_document
            documents.append(tokenizer.decode(ids[:-1].tolist()))
    return documents


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name.startswith("."))


def test_end_to_end(config: Configure, texts: list[str]) -> None:
    manifest = prepare(config())
    data = Path(config().output_dir)
    train, validation = decoded(data, "train"), decoded(data, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert 5 <= len(validation) <= 40
    assert train == [text for text in texts if text in set(train)]  # the order of the source
    assert manifest.text_bytes == sum(len(text) for text in texts)
    assert (manifest.vocab_size, manifest.dtype, manifest.tokenizer.end_of_document) == (330, "uint16", 1)
    assert sorted(os.listdir(data)) == [
        "manifest.json", "tokenizer", "train_00000.bin", "train_00000.idx", "validation_00000.bin",
        "validation_00000.idx",
    ]  # fmt: skip
    assert siblings(data) == []


def write_all_formats(folder: Path, texts: list[str]) -> dict[str, Path]:
    jsonl = write_jsonl(folder / "plain.jsonl", texts).read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl))
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
    (folder / "txt").mkdir()
    for i, text in enumerate(texts):
        (folder / "txt" / f"{i:04}.txt").write_text(text)
    return {name: folder / name for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "txt")}


def test_formats_give_the_same_data(config: Configure, texts: list[str], tmp_path: Path) -> None:
    expected = prepare(config()).fingerprint
    (tmp_path / "formats").mkdir()
    for name, source in write_all_formats(tmp_path / "formats", texts).items():
        assert prepare(config(source=str(source), output_dir=str(tmp_path / f"data {name}"))).fingerprint == expected


def test_split_does_not_depend_on_the_order(config: Configure, texts: list[str], tmp_path: Path) -> None:
    prepare(config())
    reverse = write_jsonl(tmp_path / "reverse.jsonl", texts[::-1])
    prepare(config(source=str(reverse), output_dir=str(tmp_path / "reverse"), shard_tokens=700))
    for split in ("train", "validation"):
        assert sorted(decoded(tmp_path / "data", split)) == sorted(decoded(tmp_path / "reverse", split))


def test_shards(config: Configure) -> None:
    manifest = prepare(config(shard_tokens=1000))
    shards = manifest.splits["train"].shards
    assert len(shards) > 3
    assert [shard.name for shard in shards] == [f"train_{i:05d}" for i in range(len(shards))]
    assert all(shard.tokens <= 1000 for shard in shards)
    assert len(decoded(Path(config().output_dir), "train")) == manifest.splits["train"].documents


def test_max_documents_and_no_validation(config: Configure, texts: list[str]) -> None:
    manifest = prepare(config(max_documents=50, validation_fraction=0.0, tokenizer={"vocab_size": 310}))
    assert list(manifest.splits) == ["train"]
    assert decoded(Path(config().output_dir), "train") == texts[:50]


def test_preparing_again_is_a_no_op(config: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    first = prepare(config())
    before = snapshot(Path(config().output_dir))
    capsys.readouterr()
    assert prepare(config()) == first
    assert "already holds the result of this very request" in capsys.readouterr().out
    assert snapshot(Path(config().output_dir)) == before


def refused(config: PrepareConfig) -> str:
    data = Path(config.output_dir)
    before = snapshot(data)
    with pytest.raises(DataError) as caught:
        prepare(config)
    assert snapshot(data) == before
    assert siblings(data) == []
    return str(caught.value)


def test_another_request_is_refused(config: Configure, corpus: Path) -> None:
    prepare(config())
    assert "validation_fraction is 0.1 there and 0.2 here" in refused(config(validation_fraction=0.2))
    assert "tokenizer.vocab_size is 330 there and 340 here" in refused(config(tokenizer={"vocab_size": 340}))
    corpus.write_text(corpus.read_text(encoding="utf-8") + '{"text": "new"}\n', encoding="utf-8")
    assert "source.bytes is" in refused(config())


def test_other_content_is_refused(config: Configure, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        (data / f"{i}.bin").write_text("mine")
    assert "already holds 0.bin, 1.bin, 2.bin and 2 more" in refused(config())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file is a file"):
        prepare(config(output_dir=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def test_damaged_result_is_refused(config: Configure) -> None:
    prepare(config())
    (Path(config().output_dir) / "train_00000.bin").write_bytes(b"xx")
    assert "train_00000.bin has 2 bytes" in refused(config())


def test_empty_output_folder_is_fine(config: Configure, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    prepare(config())
    assert (tmp_path / "data" / "manifest.json").is_file()


def test_the_current_folder_is_refused(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(DataError, match="is the folder that the command runs in, which cannot be replaced"):
        prepare(config(output_dir="."))


def test_a_strangers_partial_folder_stays(config: Configure, tmp_path: Path) -> None:
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "diary").write_text("mine")
    with pytest.raises(DataError, match=r"\.data\.partial is in the way"):
        prepare(config())
    assert (tmp_path / ".data.partial" / "diary").read_text() == "mine"


@pytest.mark.parametrize("fraction", [1e-6, 0.999])
def test_empty_split_names_a_fraction_that_works(config: Configure, fraction: float, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "few.jsonl", make_texts(8))
    few = {"source": str(source), "tokenizer": {"vocab_size": 290}}
    with pytest.raises(DataError, match="split empty: the source has 8 documents; validation_fraction=") as caught:
        prepare(config(**few, validation_fraction=fraction))
    assert not (tmp_path / "data").exists()
    assert siblings(tmp_path / "data") == []
    works = float(str(caught.value).split("; validation_fraction=")[1].split()[0])
    assert set(prepare(config(**few, validation_fraction=works)).splits) == {"train", "validation"}


def test_equal_documents_cannot_be_split(config: Configure, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "same.jsonl", make_texts(1) * 5)
    with pytest.raises(DataError, match=r"5 documents, all with the same text; .* validation_fraction=0"):
        prepare(config(source=str(source), tokenizer={"vocab_size": 285}))


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_source_without_documents(config: Configure, tmp_path: Path, kind: str) -> None:
    source = write_jsonl(tmp_path / "empty.jsonl", ["", " "])
    changes: dict[str, Any] = {"kind": kind}
    if kind == "huggingface":
        Tokenizer(models.WordLevel({"end": 0}, unk_token="end")).save(str(tmp_path / "tokenizer.json"))
        changes |= {"path": str(tmp_path / "tokenizer.json"), "end_of_document": "end"}
    with pytest.raises(DataError, match="no document with text"):
        prepare(config(source=str(source), tokenizer=changes))
    assert not (tmp_path / "data").exists()
    assert siblings(tmp_path / "data") == []


def test_file_without_bytes(config: Configure, tmp_path: Path) -> None:
    for name in ("empty.jsonl", "empty.txt", "empty.jsonl.gz", "empty.jsonl.zst", "empty.parquet"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"no document with text|{name} cannot be read"):
            prepare(config(source=str(tmp_path / name)))
        assert not (tmp_path / "data").exists()
        assert siblings(tmp_path / "data") == []


def test_broken_record_fails_or_is_skipped(
    config: Configure, corpus: Path, texts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with open(corpus, "a", encoding="utf-8") as file:
        file.write('not json\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:201: the line is not JSON .*on_bad_record=skip"):
        prepare(config())
    assert not (tmp_path / "data").exists()
    assert siblings(tmp_path / "data") == []
    manifest = prepare(config(on_bad_record="skip"))
    assert manifest.skipped == {"the line is not JSON": 1, "empty": 1}
    assert manifest.documents == len(texts)
    assert f"skipped 1 record: the line is not JSON ({corpus}:201)" in capsys.readouterr().out


def test_a_mistyped_path_is_told_before_the_hub_answers(
    config: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []

    def refuse(*_: object, **__: object) -> None:
        printed.append(capsys.readouterr().out)
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="if a file is meant, its path is mistyped"):
        prepare(config(source="corpus"))
    assert printed == ["corpus is no file or folder here; asking the Hugging Face Hub for a dataset of that name\n"]


def test_full_disk(config: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def append_many(self: ShardWriter, tokens: object, lengths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append_many", append_many)
    with pytest.raises(DataError, match=r"the disk of output_dir=.*data is full .*nothing was left there"):
        prepare(config())
    assert not (tmp_path / "data").exists()
    assert siblings(tmp_path / "data") == []


def test_a_disk_that_can_no_longer_be_written(
    config: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then nothing can be removed either; the next attempt does it."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append_many", refuse)
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(
            DataError, match=r"Read-only file system; .*\.data\.partial is left, for the same command to"
        ):
            prepare(config())
    assert siblings(tmp_path / "data") != []
    prepare(config())
    assert siblings(tmp_path / "data") == []


def test_wide_tokens(config: Configure, tmp_path: Path) -> None:
    vocabulary = {f"word{i}": i for i in range(70_000)} | {"[UNK]": 70_000, "<eos>": 70_001}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    source = write_jsonl(tmp_path / "wide.jsonl", [f"word{i} word{69_999 - i}" for i in range(100)])
    manifest: Manifest = prepare(
        config(source=str(source), tokenizer={"kind": "huggingface", "path": str(tmp_path / "words")})
    )
    assert (manifest.dtype, manifest.vocab_size) == ("int32", 70_002)
    tokens = Shard(tmp_path / "data" / "train_00000").tokens
    assert tokens.dtype == np.int32
    assert tokens[1] == 69_999
    assert tokens[2] == 70_001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be at least 0 and below 1"),
        ({"max_documents": 0}, "max_documents=0 must be greater than 0"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be greater than 0"),
        ({"on_bad_record": "ignore"}, "on_bad_record=ignore is not known; use fail or skip"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"tokenizer": {"vocabsize": 3}}, "tokenizer.vocabsize is not a setting .did you mean vocab_size"),
    ],
)
def test_settings_are_checked(config: Configure, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


# ---------------------------------------------------------------------------------------------------------------
# As a command
# ---------------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "data_prep.prepare", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_with_commas_and_spaces_in_paths(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a, b (c)"
    folder.mkdir()
    source = corpus.rename(folder / "it's = text.jsonl")
    result = run(f"source={source}", "tokenizer.vocab_size=330", "validation_fraction=0.1", f"output_dir={folder}/data")
    assert result.returncode == 0, result.stderr
    assert "bytes per token, vocabulary 330 (sentencepiece), uint16" in result.stdout
    verify_quick(folder / "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "source is not set; give source=VALUE"),
        (("source=embedded",), "output_dir is not set; give output_dir=VALUE"),
        (("source=embedded", "output=x"), "output is not a setting (did you mean output_dir?)"),
        (("source=embedded", "tokeniser=gpt2"), "tokeniser is not a setting (did you mean tokenizer?)"),
        (("source=embedded", "tokenizer=gpt3"), "tokenizer=gpt3 is not known; use one of gpt2, huggingface, sent"),
        (
            ("source=embedded", "tokenizer.vocabsize=9"),
            "tokenizer.vocabsize is not a setting (did you mean tokenizer.vocab_size?)",
        ),
        (("source=embedded", "output_dir=x", "tokenizer.vocab_size=many"), "tokenizer.vocab_size=many: "),
        (("source=none.jsonl", "output_dir=x"), "source=none.jsonl: none.jsonl does not exist; a source is"),
        (("source=embedded", "output_dir=x", "tokenizer=huggingface"), "tokenizer.path is not set"),
    ],
)
def test_command_mistakes_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert f"error: {message}" in result.stderr
    assert "Traceback" not in result.stderr


# The command, stopped once it has written its first tokens.
STOPPING = """
import os, signal
from data_prep.indexed import ShardWriter
from data_prep.prepare import PrepareConfig, prepare
from kraken_train.common.cli import run_entry
def stopping(self, *arguments, write=ShardWriter._write):
    write(self, *arguments)
    os.kill(os.getpid(), signal.SIGSTOP)
ShardWriter._write = stopping
run_entry(prepare, PrepareConfig, "prepare")
"""


def test_killed_attempt_leaves_no_result_and_is_cleared(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "large.jsonl", make_texts(20_000))
    arguments = (f"source={source}", "tokenizer.vocab_size=330", f"output_dir={tmp_path}/data")
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_for_stop(process)
    assert list((tmp_path / ".data.partial").glob(".train_*.bin.tmp"))
    meanwhile = run(*arguments)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "data").exists()
    holder = f"is being prepared by another process right now (process {process.pid} on {socket.gethostname()})"
    assert meanwhile.returncode == 2
    assert f"output_dir={tmp_path}/data {holder}; wait for it" in meanwhile.stderr
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert verify_quick(tmp_path / "data").documents == 20_000
    assert siblings(tmp_path / "data") == []
