from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.indexed import Shard, ShardWriter, token_dtype
from kraken_train.common.errors import DataError

U2 = np.dtype("<u2")


def write(prefix: Path, documents: list[list[int]], dtype: np.dtype = U2) -> Path:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.append(document)
    return prefix


def pack_index(code: int, lengths: list[int], offsets: list[int], boundaries: list[int]) -> bytes:
    """The layout of Megatron's index, written down independently of data_prep.indexed."""
    return (
        b"MMIDIDX\0\0"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(boundaries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )


@pytest.mark.parametrize(("dtype", "code", "letter"), [("<u2", 8, "H"), ("<i4", 4, "i")])
def test_bytes_on_disk(tmp_path: Path, dtype: str, code: int, letter: str) -> None:
    write(tmp_path / "a", [[5, 6, 7], [], [8]], np.dtype(dtype))
    size = struct.calcsize(letter)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack(f"<4{letter}", 5, 6, 7, 8)
    assert (tmp_path / "a.idx").read_bytes() == pack_index(code, [3, 0, 1], [0, 3 * size, 3 * size], [0, 1, 2, 3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_reads_several_sequences_per_document(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(struct.pack("<6i", 1, 2, 3, 4, 5, 6))
    (tmp_path / "b.idx").write_bytes(pack_index(4, [1, 2, 3], [0, 4, 12], [0, 2, 3]))
    shard = Shard(tmp_path / "b")
    assert (shard.num_documents, shard.num_sequences, shard.num_tokens) == (2, 3, 6)
    assert shard.document(0).tolist() == [1, 2, 3]
    assert shard.document(1).tolist() == [4, 5, 6]
    assert shard.sequence(1).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("code", "letter", "low"), [(1, "B", 0), (2, "b", -128), (3, "h", -9), (4, "i", -9), (5, "q", -9), (8, "H", 0)]
)
def test_reads_every_type_code(tmp_path: Path, code: int, letter: str, low: int) -> None:
    (tmp_path / "c.bin").write_bytes(struct.pack(f"<3{letter}", low, 1, 127))
    size = struct.calcsize(letter)
    (tmp_path / "c.idx").write_bytes(pack_index(code, [1, 2], [0, size], [0, 1, 2]))
    shard = Shard(tmp_path / "c")
    assert [shard.document(i).tolist() for i in range(2)] == [[low], [1, 127]]
    assert shard.dtype.itemsize == size


def test_offsets_beyond_four_gigabytes(tmp_path: Path) -> None:
    longest = 2**31 - 1
    with open(tmp_path / "l.bin", "wb") as file:
        file.seek(2 * longest)  # a hole
        file.write(struct.pack("<3H", 7, 8, 9))
    (tmp_path / "l.idx").write_bytes(pack_index(8, [longest, 2, 1], [0, 2 * longest, 2 * longest + 4], [0, 1, 2, 3]))
    shard = Shard(tmp_path / "l")
    assert shard.num_tokens == 2**31 + 2
    assert [shard.document(i).tolist() for i in (1, 2)] == [[7, 8], [9]]
    assert shard.document_lengths().tolist() == [longest, 2, 1]


def test_lengths_of_documents(tmp_path: Path) -> None:
    """Of several sequences, of none, and of sequences without tokens."""
    (tmp_path / "d.bin").write_bytes(bytes(6))
    (tmp_path / "d.idx").write_bytes(pack_index(1, [1, 2, 0, 3], [0, 1, 3, 3], [0, 2, 2, 3, 4]))
    assert Shard(tmp_path / "d").document_lengths().tolist() == [3, 0, 0, 3]


@settings(max_examples=30)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=8).filter(any),
    wide=st.booleans(),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], wide: bool) -> None:
    prefix = write(tmp_path_factory.mktemp("shard") / "s", documents, np.dtype("<i4") if wide else U2)
    shard = Shard(prefix)
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]


def test_type_follows_vocabulary() -> None:
    assert token_dtype(65499) == np.dtype("uint16")
    assert token_dtype(65500) == np.dtype("int32")


def test_refuses_tokens_that_do_not_fit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", U2)
    with pytest.raises(DataError, match=r"65536.*uint16"):
        writer.append([1, 65536])
    with pytest.raises(DataError, match="integers"):
        writer.append([0.5])
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "s", U2) as writer:
        writer.append([1])
        assert [p.name for p in tmp_path.iterdir()] == [".s.bin.tmp"]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


GOOD = pack_index(8, [2, 1], [0, 4], [0, 1, 2])
BAD_INDICES = {
    "is empty": b"",
    "truncated: 20 bytes, but its header alone has 34": GOOD[:20],
    "starts with b'XMIDIDX": b"X" + GOOD[1:],
    "version 2 of the index": GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:],
    "type code 9; known are 1, 2": GOOD[:17] + b"\x09" + GOOD[18:],
    "holds float32 numbers": GOOD[:17] + b"\x07" + GOOD[18:],
    "holds float64 numbers": GOOD[:17] + b"\x06" + GOOD[18:],
    "header says 82 .* it is truncated": GOOD[:-1],
    "header says 82 .* belongs to other data": GOOD + b"\0",
    "sequence 1 has length -1": pack_index(8, [2, -1], [0, 4], [0, 1, 2]),
    "sequence 1 starts at byte 2, not at 4": pack_index(8, [2, 1], [0, 2], [0, 1, 2]),
    "must rise from 0 to 2, but go from 0 to 2 and fall": pack_index(8, [2, 1], [0, 4], [0, 3, 2]),
    "must rise from 0 to 2, but go from 1 to 2": pack_index(8, [2, 1], [0, 4], [1, 1, 2]),
    "no documents": pack_index(8, [], [], [0]),
    "without any token": pack_index(8, [0], [0], [0, 1]),
}


@pytest.mark.parametrize("message", BAD_INDICES)
def test_damaged_index(tmp_path: Path, message: str) -> None:
    (tmp_path / "s.bin").write_bytes(struct.pack("<3H", 1, 2, 3))
    (tmp_path / "s.idx").write_bytes(GOOD)
    assert Shard(tmp_path / "s").tokens.tolist() == [1, 2, 3]
    (tmp_path / "s.idx").write_bytes(BAD_INDICES[message])
    with pytest.raises(DataError, match=message) as caught:
        Shard(tmp_path / "s")
    assert str(tmp_path / "s.idx") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "s.bin does not exist"),
        (b"", "s.bin is empty"),
        (b"1234", "has 4 bytes, but its index says 6: it is truncated"),
        (b"12345678", "has 8 bytes, but its index says 6: .* other data"),
    ],
)
def test_damaged_tokens(tmp_path: Path, content: bytes | None, message: str) -> None:
    (tmp_path / "s.idx").write_bytes(GOOD)
    if content is not None:
        (tmp_path / "s.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "s")


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s.idx does not exist"):
        Shard(tmp_path / "s")
