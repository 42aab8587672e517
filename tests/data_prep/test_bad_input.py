"""Records that are no documents, rules for documents, parts of a source, and well-known datasets."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
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
from hydra import compose, initialize_config_dir

from data_prep import files
from data_prep.documents import BadRecords, Part, TextRules, find_documents
from data_prep.indexed import Shard
from data_prep.manifest import Manifest
from data_prep.prepare import PrepareConfig, prepare
from data_prep.sources import SourceSettings, open_source
from data_prep.tokenizers import load_tokenizer
from kraken_train.common.cli import CONF_DIR
from kraken_train.common.errors import ConfigError, DataError

Configure = Callable[..., PrepareConfig]


def stream(data: Path, manifest: Manifest) -> list[int]:
    """All tokens of the train split, then those of the validation split."""
    shards = [Shard(data / entry.name).tokens for split in manifest.splits.values() for entry in split.shards]
    return np.concatenate(shards).tolist()  # type: ignore[no-any-return]


def read(path: Path, rules: TextRules, **settings: Any) -> tuple[list[str], BadRecords]:
    bad = BadRecords(rules)
    source = open_source(SourceSettings(str(path), max_document_bytes=rules.max_document_bytes, **settings))
    return [document.text for document in source.documents(bad)], bad


def test_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_EXTRA_BYTES", 100)
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    texts = ["short", "é" * 51, "x" * 100_000, "y" * 100, "z" * 101]
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_text("t" * 100_000)
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    found, bad = read(tmp_path, TextRules(on_bad_record="skip", max_document_bytes=100))
    assert found == ["short", "y" * 100] * 2
    assert dict(bad.counts) == {"the document is longer than max_document_bytes=100": 7}
    assert bad.places[next(iter(bad.counts))] == [f"{tmp_path}/a.jsonl:{line}" for line in (2, 3, 5)]
    with pytest.raises(
        DataError, match=r"a.jsonl:2: the document is longer than max_document_bytes=100 \(it has 102 b"
    ):
        read(tmp_path, TextRules(max_document_bytes=100))


def test_a_gigantic_line_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    line = b'{"text": "' + b"x" * 100_000_000 + b'"}\n'
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n' + line + b'{"text": "b"}\n'))
    del line
    tracemalloc.start()
    found, bad = read(path, TextRules(on_bad_record="skip", max_document_bytes=1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["a", "b"]
    assert bad.counts.total() == 1
    assert bad.summary()[0].endswith(f"({path}:2)")
    assert peak < 20_000_000


def test_short_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["abc", "ab", " \n", "日本語", "e\u0301x"])
    found, bad = read(tmp_path, TextRules(min_length=3, normalization="NFC"))
    assert found == ["abc", "日本語"]
    assert bad.counts == {"shorter than min_length=3": 2, "empty": 1}
    with pytest.raises(DataError, match=r"a.jsonl:2: shorter than min_length=3; .*on_short_document=skip"):
        read(tmp_path, TextRules(min_length=3, on_short_document="fail"))


def test_normalization(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["e\u0301 \ufb01"])
    assert read(tmp_path, TextRules())[0] == ["e\u0301 \ufb01"]
    assert read(tmp_path, TextRules(normalization="NFC"))[0] == ["é \ufb01"]
    assert read(tmp_path, TextRules(normalization="NFKC"))[0] == ["é fi"]


def test_a_file_with_other_columns_can_be_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["y"]}), tmp_path / "b.parquet")
    found, bad = read(tmp_path, TextRules(on_bad_record="skip"))
    assert found == ["y"]
    assert dict(bad.places) == {"the file has no column text": [f"{tmp_path}/a.parquet"]}


def test_parquet_with_invalid_utf8(tmp_path: Path) -> None:
    column = pa.array([b"good", b"b\xffd"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found, bad = read(tmp_path, TextRules(on_bad_record="skip"))
    assert found == ["good"]
    assert dict(bad.places) == {"the text is not valid UTF-8": [f"{tmp_path}/a.parquet row 2"]}


def test_settings_are_recorded(config: Configure, corpus: Path, texts: list[str]) -> None:
    write_jsonl(corpus, [*texts, texts[0], "short", texts[1]])
    changes = {"drop_duplicates": True, "min_length": 8, "normalization": "NFC", "append_end_of_document": False}
    manifest = prepare(config(**changes))
    assert {name: manifest.request[name] for name in changes} == changes
    assert manifest.skipped == {"duplicate": 2, "shorter than min_length=8": 1}
    assert manifest.skipped_places["duplicate"] == [f"{corpus}:201", f"{corpus}:203"]
    assert manifest.documents == len(texts)
    assert manifest.round_trips["checked"] >= 1
    assert manifest.round_trips["failed"] == 0
    data = Path(config().output_dir)
    tokens = stream(data, manifest)
    assert manifest.tokenizer.end_of_document not in tokens
    assert sorted(load_tokenizer(data / "tokenizer").decode(tokens)) == sorted("".join(texts))


def test_text_that_does_not_come_back_is_reported(
    config: Configure, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(corpus, [text.replace("sea", "日本") for text in make_texts(200)])
    manifest = prepare(config(tokenizer={"byte_fallback": False, "vocab_size": 120, "character_coverage": 0.98}))
    assert manifest.round_trips["failed"] >= 1
    assert re.search(r"corpus.jsonl:\d+: '.*' became '.*⁇.*' at character \d+", manifest.round_trips["example"])
    assert "did not come back as they were: " in capsys.readouterr().out


def test_max_documents_counts_nothing_behind_the_last(config: Configure, corpus: Path, texts: list[str]) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join([*lines[:120], '{"text": ""}\n', "broken\n", *lines[120:]]), encoding="utf-8")
    manifest = prepare(config(max_documents=120))
    assert manifest.documents == 120
    assert manifest.skipped == {}


# ---------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------


def write_formats(folder: Path, texts: list[str]) -> None:
    """All kinds of files, in the order of the texts, some without a text."""
    folder.mkdir()
    fifth = len(texts) // 5
    write_jsonl(folder / "a.jsonl", texts[:fifth])
    plain = write_jsonl(folder / "x", texts[fifth : 2 * fifth])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    pq.write_table(pa.table({"text": texts[2 * fifth : 4 * fifth]}), folder / "c.parquet", row_group_size=7)
    (folder / "d.txt").write_text("")
    write_jsonl(folder / "e.jsonl", [])
    for number, text in enumerate(texts[4 * fifth :]):
        (folder / f"f{number:03}.txt").write_text(text)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 200])
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_parts_are_the_whole(tmp_path: Path, count: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    texts = make_texts(100)
    write_formats(tmp_path / "source", texts)
    source = open_source(SourceSettings(str(tmp_path / "source")))
    found: list[tuple[str, str]] = []
    bad = BadRecords("fail")
    for index in range(1, count + 1):
        for _, part in source.blocks(part=Part(index, count)):
            found += [(document.text, document.place) for document in find_documents(part, bad)]
    assert [text for text, _ in found] == texts
    assert [place for _, place in found] == [document.place for document in source.documents(BadRecords("fail"))]
    assert dict(bad.counts) == {"empty": 1}


def test_reading_goes_on_behind_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 500)
    write_formats(tmp_path / "source", make_texts(60))
    for source in (open_source(SourceSettings(str(tmp_path / "source"))), open_source(SourceSettings("embedded"))):
        part = Part(2, 3) if source.kind == "files" else Part(2, 30)
        blocks = list(source.blocks(part=part))
        assert len(blocks) > 3
        for done in range(len(blocks)):
            assert list(source.blocks(blocks[done][0], part)) == blocks[done + 1 :]
        assert source.fraction == 1.0


def test_slices_make_up_one_preparation(config: Configure, tmp_path: Path) -> None:
    whole = prepare(config())
    slices = [prepare(config(slice=f"{i}/3", output_dir=str(tmp_path / f"slice{i}"))) for i in (1, 2, 3)]
    assert [s.request["slice"] for s in slices] == ["1/3", "2/3", "3/3"]
    assert len({json.dumps(s.tokenizer.files) for s in (whole, *slices)}) == 1  # trained on all of the source
    for split in ("train", "validation"):
        expected = [Shard(tmp_path / "data" / entry.name).tokens for entry in whole.splits[split].shards]
        parts = [
            Shard(tmp_path / f"slice{i}" / entry.name).tokens
            for i, manifest in enumerate(slices, 1)
            for entry in (manifest.splits[split].shards if split in manifest.splits else [])
        ]
        assert np.array_equal(np.concatenate(parts), np.concatenate(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice": "0/3"}, "slice=0/3 must be PART/PARTS, as in slice=3/16"),
        ({"slice": "4/3"}, "with PART from 1 to PARTS"),
        ({"slice": "1/2", "max_documents": 5}, "max_documents=5 needs all of the source, so it cannot be combined"),
        ({"slice": "1/2", "drop_duplicates": True}, "drop_duplicates=true needs all of the source"),
        ({"min_length": 0}, "min_length=0 must be at least 1"),
        ({"normalization": "nfc"}, "normalization=nfc is not known; use none or NFC or NFKC"),
        ({"max_document_bytes": 0}, "max_document_bytes=0 must be greater than 0"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
    ],
)
def test_settings_are_checked(config: Configure, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


# ---------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_dataset_blocks(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    rows = datasets.Dataset.from_dict({"text": make_texts(100)})

    def load_dataset(*_: object, **keywords: object) -> object:
        assert keywords["streaming"] is streaming
        assert keywords["revision"] == "main"
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("data_prep.hub.MOST_ROWS", 7)
    source = open_source(SourceSettings("owner/name", dataset_streaming=streaming, dataset_revision="main"))
    assert [document.text for document in source.documents(BadRecords("fail"))] == make_texts(100)
    blocks = list(source.blocks())
    assert list(source.blocks(blocks[3][0])) == blocks[4:]
    if streaming:
        with pytest.raises(DataError, match=r"its number of rows is not known.*dataset_streaming=false"):
            list(source.blocks(part=Part(1, 3)))
    else:
        parts = [value for i in (1, 2, 3) for _, block in source.blocks(part=Part(i, 3)) for value in block.values]
        assert parts == [value for _, block in blocks for value in block.values]


def test_openwebtext_from_a_folder_of_parquet(tmp_path: Path, texts: list[str]) -> None:
    folder = tmp_path / "plain_text"
    folder.mkdir()
    for number in range(4):
        pq.write_table(pa.table({"text": texts[50 * number : 50 * number + 50]}), folder / f"train-{number:05}.parquet")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("prepare", ["data=openwebtext", "output_dir=x"])
        assert (composed.source, composed.text_field) == ("Skylion007/openwebtext", "text")
        assert compose("prepare", ["data=openwebtext", f"source={folder}"]).source == str(folder)
    assert read(folder, TextRules())[0] == texts
