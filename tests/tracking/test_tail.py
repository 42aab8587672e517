"""Reading a file that grows, is half-written, and is replaced."""

from __future__ import annotations

from pathlib import Path

from kraken_train.tracking.tail import Tail


def test_growing_and_replaced(tmp_path: Path) -> None:
    path, replaced = tmp_path / "metrics.jsonl", []
    tail = Tail(path, lambda: replaced.append(True))
    assert list(tail.read()) == []
    with path.open("w", buffering=1) as file:
        file.write('{"step": 1}\n{"st')
        assert list(tail.read()) == [{"step": 1}]
        assert list(tail.read()) == []
        file.write('ep": 2}\nno json\n[3]\n')
        assert list(tail.read()) == [{"step": 2}]
    assert not replaced
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n')
    other.replace(path)
    assert list(tail.read()) == [{"step": 1}]
    assert replaced == [True]
    with path.open("a") as file:
        file.write('{"step": 5}\n')
    assert list(tail.read()) == [{"step": 5}]
    assert replaced == [True]
