"""Shards against megatron-core itself: it reads what we write, and we read what it writes.

Runs where the package is installed (`pip install --no-deps megatron-core`, in an environment of its own). The byte
layout, written down independently, is always tested: test_indexed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.indexed import Shard, ShardWriter, bin_path, idx_path, token_dtype
from data_prep.manifest import load_manifest
from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizers import load_tokenizer
from kraken_train.common.errors import DataError

megatron = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed, so only the layout was tested"
)

DOCUMENTS = [[[5, 6, 7]], [[1], [2, 3], [4, 8, 9, 10]], [[11, 12]], [[127], [0]]]  # documents of sequences of tokens


def read_all(prefix: Path, mmap: bool = True) -> list[list[int]]:
    """The documents of a shard, as megatron-core reads them."""
    dataset = megatron.IndexedDataset(str(prefix), mmap=mmap)
    sequences = [dataset[i] for i in range(len(dataset))]
    ends = dataset.document_indices.tolist()
    return [[int(token) for sequence in sequences[first:last] for token in sequence] for first, last in pairwise(ends)]


@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_reads_every_shard(config: Callable[..., PrepareConfig], texts: list[str], mmap: bool) -> None:
    prepare(config(shard_tokens=4000))
    data = Path(config().output_dir)
    manifest, tokenizer = load_manifest(data), load_tokenizer(data / "tokenizer")
    found: dict[str, list[list[int]]] = {}
    for split, entry in ((name, shard) for name, s in manifest.splits.items() for shard in s.shards):
        shard = Shard(data / entry.name)
        documents = read_all(data / entry.name, mmap)
        assert documents == [shard.document(i).tolist() for i in range(shard.num_documents)]
        assert megatron.IndexedDataset(str(data / entry.name)).index.dtype == shard.dtype
        found.setdefault(split, []).extend(documents)
    assert len(manifest.splits["train"].shards) > 2

    expected = [[*ids, tokenizer.end_of_document] for ids in tokenizer.encode_batch(texts)]
    validation = [document for document in expected if document in found["validation"]]
    assert found["validation"] == validation
    assert found["train"] == [document for document in expected if document not in validation]


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_the_type_follows_the_same_rule(tmp_path: Path, vocab_size: int) -> None:
    assert token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)
    documents = [[vocab_size - 1, 0, 7], [], [3]]
    with ShardWriter(tmp_path / "s", token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.append(document)
    assert read_all(tmp_path / "s") == documents


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type[np.integer]) -> None:
    prefix = write_with_megatron(tmp_path / "m", dtype)
    shard = Shard(prefix)
    assert shard.dtype == dtype
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == [list(chain(*d)) for d in DOCUMENTS]
    sequences = [sequence for document in DOCUMENTS for sequence in document]
    assert [shard.sequence(i).tolist() for i in range(shard.num_sequences)] == sequences
    assert shard.document_lengths().tolist() == [sum(map(len, document)) for document in DOCUMENTS]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_that_are_no_tokens(tmp_path: Path, dtype: type[np.floating]) -> None:
    with pytest.raises(DataError, match=f"holds {np.dtype(dtype).name} numbers, but tokens are integers"):
        Shard(write_with_megatron(tmp_path / "m", dtype))


def test_the_same_bytes_from_both(tmp_path: Path) -> None:
    """With one sequence per document there is nothing to choose, so the files are equal."""
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with ShardWriter(tmp_path / "ours", np.dtype("<u2")) as ours:
        for document in ([3, 4, 5], [6], list(range(100))):
            theirs.add_document(torch.tensor(document), [len(document)])
            ours.append(document)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()


def write_with_megatron(prefix: Path, dtype: type[np.number]) -> Path:
    """Half of the documents at once, half sequence by sequence, joined from two files."""
    for name, documents in (("first", DOCUMENTS[:2]), ("second", DOCUMENTS[2:])):
        builder = megatron.IndexedDatasetBuilder(f"{prefix}.{name}.bin", dtype=dtype)
        for document in documents:
            if name == "first":
                builder.add_document(torch.tensor(list(chain(*document))), [len(sequence) for sequence in document])
            else:
                for sequence in document:
                    builder.add_item(torch.tensor(sequence))
                builder.end_document()
        builder.finalize(f"{prefix}.{name}.idx")
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_index(f"{prefix}.first")
    builder.add_index(f"{prefix}.second")
    builder.finalize(f"{prefix}.idx")
    return prefix
