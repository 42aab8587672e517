from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.documents import BadRecords
from data_prep.sources import SourceSettings, open_source
from kraken_train.common.errors import DataError


def read(path: Path | str, bad: BadRecords | None = None, **settings: str | int) -> list[str]:
    source = open_source(SourceSettings(str(path), **settings))
    return [document.text for document in source.documents(bad or BadRecords("fail"))]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


TWO = lines({"text": "one\n"}, {"text": "two 🦑", "id": 3})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", TWO),
        ("marked.jsonl", b"\xef\xbb\xbf" + TWO),
        ("marked twice.jsonl", b"".join(b"\xef\xbb\xbf" + line for line in TWO.splitlines(keepends=True))),
        ("marked and blank.jsonl", b"\xef\xbb\xbf\n" + TWO + b"\xef\xbb\xbf"),
        ("blank.jsonl", TWO.replace(b"}\n", b"}\r\n\n")),
        ("no end.jsonl", TWO.rstrip()),
        ("a.jsonl.gz", gzip.compress(TWO, mtime=0)),
        ("two members.jsonl.gz", b"".join(gzip.compress(line, mtime=0) for line in TWO.splitlines(keepends=True))),
        ("a.jsonl.zst", zstandard.compress(TWO)),
        ("two frames.jsonl.zst", b"".join(zstandard.compress(line) for line in TWO.splitlines(keepends=True))),
    ],
)
def test_jsonl(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ["one\n", "two 🦑"]


def test_other_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "one"}))
    assert read(tmp_path / "a.jsonl", text_field="body") == ["one"]


def test_parquet_in_row_groups(tmp_path: Path) -> None:
    expected = [f"document {i}" for i in range(2500)]
    pq.write_table(pa.table({"text": expected, "id": range(2500)}), tmp_path / "a.parquet", row_group_size=700)
    assert read(tmp_path / "a.parquet") == expected


def test_mixed_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "2.txt").write_bytes(b"second\r\n")
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "first"}))
    pq.write_table(pa.table({"text": ["third"]}), tmp_path / "c.parquet")
    (tmp_path / ".hidden" / "0.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("ignored")
    source = open_source(SourceSettings(str(tmp_path)))
    documents = list(source.documents(BadRecords("fail")))
    assert [document.text for document in documents] == ["first", "second\r\n", "third"]
    assert [document.place for document in documents] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b/2.txt",
        f"{tmp_path}/c.parquet row 1",
    ]
    assert source.left_out == [  # type: ignore[attr-defined]
        f"left out 1 entry of the source: hidden ({tmp_path}/.hidden)",
        f"left out 1 entry of the source: of no kind that is read ({tmp_path}/README.md)",
    ]


BROKEN_LINES = {
    r"a.jsonl:2: the line is not JSON \(Expecting value at column 10\)": b'{"text": oops}',
    r"a.jsonl:2: the line is not a JSON object \(it is list\)": b"[1]",
    r"a.jsonl:2: the record has no field text \(its fields: id, body; text_field=FIELD takes one\)": (
        b'{"id": 1, "body": "x"}'
    ),
    r"a.jsonl:2: the text is not a string \(it is NoneType\)": b'{"text": null}',
    r"a.jsonl:2: the line is not valid UTF-8 \(byte 0xff at position 10\)": b'{"text": "\xff"}',
    r"a.jsonl:2: the text is not valid Unicode \(lone surrogate '\\ud800'\)": b'{"text": "\\ud800"}',
    r"a.jsonl:2: the line is not JSON \(.*recursion": b"[" * 100_000,
}


@pytest.mark.parametrize("message", BROKEN_LINES)
def test_broken_line(tmp_path: Path, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "good"}) + BROKEN_LINES[message] + b"\n" + lines({"text": "good too"}))
    with pytest.raises(DataError, match=message + ".*on_bad_record=skip"):
        read(path)
    bad = BadRecords("skip")
    assert read(path, bad) == ["good", "good too"]
    assert sum(bad.counts.values()) == 1
    assert f"({path}:2)" in bad.summary()[0]


def test_skipped_records_are_summed_up_by_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"?\n" * 5 + b"1\n" + lines({"text": "good"}, {"text": " \n"}))
    bad = BadRecords("skip")
    assert read(tmp_path / "a.jsonl", bad) == ["good"]
    assert dict(bad.counts) == {"the line is not JSON": 5, "the line is not a JSON object": 1, "empty": 1}
    path = tmp_path / "a.jsonl"
    assert bad.summary()[0] == f"skipped 5 records: the line is not JSON ({path}:1, {path}:2, {path}:3, ...)"


def test_empty_documents_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("text")
    bad = BadRecords("fail")
    assert read(tmp_path, bad) == ["text"]
    assert dict(bad.counts) == {"empty": 1}


def test_text_file_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt: the file is not valid UTF-8 .byte 0xfc at position 2"):
        read(tmp_path)


def test_parquet_nulls_are_broken_records(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet row 2: the text is not a string"):
        read(tmp_path / "a.parquet")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column text .its columns are id, body; .*text_field="):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_compressed_file_cut_off(tmp_path: Path, suffix: str) -> None:
    content = lines(*({"text": f"document {i}"} for i in range(50_000)))
    whole = gzip.compress(content, mtime=0) if suffix == ".jsonl.gz" else zstandard.compress(content)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a{suffix}:\d+: .*the file is damaged; copy it again"):
        read(path, BadRecords("skip"))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_file_of_another_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("this is neither\n" * 5)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name, BadRecords("skip"))


@pytest.mark.parametrize("name", ["no/such/folder", "missing.jsonl", "./x", "/nowhere", ""])
def test_unknown_source(name: str) -> None:
    with pytest.raises(DataError, match=r"does not exist; a source is a \.txt.*embedded"):
        open_source(SourceSettings(name))


def test_folder_and_file_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files; known are"):
        open_source(SourceSettings(str(tmp_path)))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"holds nothing to read: left out 1 entry .*a.csv\); known are .txt"):
        open_source(SourceSettings(str(tmp_path)))
    with pytest.raises(DataError, match=r"a.csv: this kind of file is not known; known are .txt"):
        open_source(SourceSettings(str(tmp_path / "a.csv")))


def test_dataset_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(*arguments: object, **keywords: object) -> datasets.IterableDataset:
        asked.extend([*arguments, keywords["split"], keywords["streaming"]])
        return datasets.Dataset.from_dict({"text": ["a", None, "b"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    bad = BadRecords("skip")
    assert read("owner/name", bad, dataset_split="test") == ["a", "b"]
    assert asked == ["owner/name", None, "test", True]
    assert bad.places == {"the text is not a string": ["owner/name row 2"]}
    with pytest.raises(DataError, match="no column body; its columns are text"):
        read("owner/name", text_field="body")


class FailingRows:
    """A dataset of 9,000 rows, the reading of which fails before row `number`, `times` times; skips count."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times = number, times
        self.first = 0
        self.skips: list[int] = []

    def skip(self, count: int) -> FailingRows:
        self.skips.append(count)
        self.first = count
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        for row in range(self.first, 9000):
            if row == self.number and self.times > 0:
                self.times -= 1
                raise ConnectionError("the server has hung up")
            yield {"text": f"row {row}"}


@pytest.mark.parametrize(("number", "times"), [(5000, 1), (5000, 3), (0, 2), (8999, 1)])
def test_a_stream_that_fails_is_read_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, times: int
) -> None:
    rows, pauses = FailingRows(number, times), list[float]()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert read("owner/name", dataset_retries=3) == [f"row {row}" for row in range(9000)]
    assert rows.times == 0
    assert pauses == [1, 2, 4][:times]
    assert rows.skips == ([number] * times if number else [])
    note = (
        f"note: reading row {number + 1} from the Hugging Face Hub failed (the server has hung up); it is tried again"
    )
    assert capsys.readouterr().out.count(note) == times


def test_a_stream_that_fails_for_good_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FailingRows(5000, 100)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"reading row 5001 .* failed \(the server has hung up\), 3 times; check"):
        read("owner/name", dataset_retries=2)
    assert rows.times == 97


def test_dataset_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as caught:
        read("owner/name", BadRecords("skip"))
    message = str(caught.value)
    assert "source=owner/name: there is no such file or folder" in message
    assert "Couldn't reach" in message
    assert "network" in message
    assert "\n" not in message


def test_embedded_corpus() -> None:
    first, second = read("embedded"), read("embedded")
    assert first == second
    assert sum(len(text.encode()) for text in first) > 1_000_000
    assert any(text.startswith("argparse\n\nCommand-line parsing library") for text in first)
