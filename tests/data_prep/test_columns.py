"""Text columns of Parquet files in each of Arrow's types."""

from __future__ import annotations

import base64
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import files
from data_prep.columns import holds_text, plain, plain_size
from data_prep.documents import BadRecords, Part
from data_prep.files import FilesSource
from kraken_train.common.errors import DataError

TEXTS = ["one", "two 🦑", None, "one", "", "two 🦑"]
NAMES = pa.dictionary(pa.int8(), pa.large_string())
READ = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of large strings": pa.array(TEXTS, pa.large_string()).dictionary_encode().cast(NAMES),
    "json": pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(TEXTS)),
}
REFUSED = {
    "int64": [1],
    "binary": [b"one"],
    "list<element: string>": [["one"]],
    "struct<a: string>": [{"a": "one"}],
    "double": [1.5],
}


@pytest.mark.parametrize("column", READ.values(), ids=READ)
def test_types_that_hold_text(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"id": range(6), "text": column}), tmp_path / "a.parquet", row_group_size=4)
    bad = BadRecords("skip")
    found = list(FilesSource(tmp_path / "a.parquet", "text").documents(bad))
    assert [document.text for document in found] == ["one", "two 🦑", "one", "two 🦑"]
    assert bad.places == {
        "the text is not a string": [f"{tmp_path}/a.parquet row 3"],
        "empty": [f"{tmp_path}/a.parquet row 5"],
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_types_that_hold_no_text(tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"body": pa.array(REFUSED[kind])}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        list(FilesSource(tmp_path / "a.parquet", "body").documents(BadRecords("fail")))
    message = f"{tmp_path}/a.parquet: the column body has the type {kind}, which is no text (choose another"
    assert str(caught.value).startswith(message)


def test_categories_of_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": pandas.Categorical(["b", "a", "b"])})
    frame.to_parquet(tmp_path / "a.parquet")
    found = FilesSource(tmp_path / "a.parquet", "text").documents(BadRecords("fail"))
    assert [document.text for document in found] == ["b", "a", "b"]


@pytest.mark.parametrize("values", [pa.large_string(), pa.string_view()], ids=str)
def test_categories_of_other_writers(tmp_path: Path, values: pa.DataType) -> None:
    """As Polars writes them: strings, and a schema of Arrow that says of what type they have been."""
    schema = pa.schema({"text": pa.dictionary(pa.uint32(), values)}).serialize().to_pybytes()
    table = pa.table({"text": TEXTS})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"ARROW:schema": base64.b64encode(schema)})
    assert str(pq.read_schema(tmp_path / "a.parquet").field("text").type).startswith("dictionary")
    found = FilesSource(tmp_path / "a.parquet", "text").documents(BadRecords("skip"))
    assert [document.text for document in found] == ["one", "two 🦑", "one", "two 🦑"]


def test_a_dictionary_of_long_texts_is_spelt_out_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long text in all rows is little on disk; blocks keep their size, and parts of the source their rows."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 10_000)
    texts = ["x" * 6000, "y"] * 50
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), tmp_path / "a.parquet")
    source = FilesSource(tmp_path / "a.parquet", "text")
    assert [document.text for document in source.documents(BadRecords("fail"))] == texts
    assert all(block.size < 3 * 10_000 for _, block in source.blocks())
    rows = [
        text
        for part in range(1, 4)
        for _, block in source.blocks(part=Part(part, 3))
        for _, text in block.records(BadRecords("fail"))
    ]
    assert rows == texts


def test_arrays_that_are_in_no_file() -> None:
    """Since pyarrow does not write them."""
    column = pa.RunEndEncodedArray.from_arrays([3, 5], ["one", "two"])
    assert holds_text(column.type)
    assert plain(column.slice(2, 2)).to_pylist() == ["one", "two"]
    assert plain_size(column) >= 15
    views = pa.DictionaryArray.from_arrays([0, 1, None, 0], pa.array(["one", "two"], pa.string_view()))
    assert plain(views).to_pylist() == ["one", "two", None, "one"]
    assert plain_size(views) == 9
    assert not holds_text(pa.RunEndEncodedArray.from_arrays([3, 5], [1, 2]).type)
