"""Two preparations of one output folder: the second is refused, whenever it comes, and the first's result is intact."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_texts, write_jsonl

from data_prep import output
from data_prep import prepare as prepare_module
from data_prep.output import attempt
from data_prep.prepare import PrepareConfig, prepare
from kraken_train.common.errors import DataError
from kraken_train.common.settings import from_dict


@pytest.fixture
def config(tmp_path: Path, tokenizer_dir: Path) -> PrepareConfig:
    settings = {
        "source": str(write_jsonl(tmp_path / "a.jsonl", make_texts(20))),
        "output_dir": str(tmp_path / "data"),
        "validation_fraction": 0.0,
        "num_workers": 0,
        "tokenizer": {"kind": "sentencepiece_model", "path": str(tokenizer_dir / "tokenizer.model")},
    }
    return from_dict(settings, PrepareConfig)


def intact(folder: Path) -> bool:
    """Whether it holds the result of `other`, and no attempt is left beside it."""
    return (folder / "result").read_text() == "of the first" and sorted(os.listdir(folder.parent)) == [
        "a.jsonl",
        "data",
    ]


def begin(folder: Path, other: ExitStack) -> None:
    """An attempt of another process, which ends when `other` is closed."""
    first = other.enter_context(attempt(folder, {}, resume=True))
    (first.folder / "result").write_text("of the first")


def test_while_the_first_is_at_work(config: PrepareConfig, tmp_path: Path) -> None:
    with ExitStack() as other:
        begin(tmp_path / "data", other)
        with pytest.raises(DataError) as caught:
            prepare(config)
        assert f"output_dir={tmp_path}/data is being prepared by another process right now" in str(caught.value)
        assert f"(process {os.getpid()} on {socket.gethostname()})" in str(caught.value)
    assert intact(tmp_path / "data")


def test_when_the_first_ends_before_the_second_has_the_lock(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ExitStack()
    begin(tmp_path / "data", other)
    try_lock = output.try_lock

    def late(descriptor: int) -> bool:
        other.close()
        return try_lock(descriptor)

    monkeypatch.setattr(output, "try_lock", late)
    with pytest.raises(DataError, match=r"output_dir=.*/data was being prepared by another process until now; repeat"):
        prepare(config)
    assert intact(tmp_path / "data")


def test_when_the_first_ends_after_the_second_has_looked(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(folder: Path, *_: Any) -> None:
        with ExitStack() as other:
            begin(folder, other)

    monkeypatch.setattr(prepare_module, "finished_result", meanwhile)
    worked = []
    real = prepare_module.make_tokenizer

    def working(*arguments: Any) -> Any:
        worked.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(prepare_module, "make_tokenizer", working)
    with pytest.raises(DataError, match=r"output_dir=.*/data was being prepared by another process until now; repeat"):
        prepare(config)
    assert intact(tmp_path / "data")
    assert not worked


def test_an_attempt_that_goes_on_names_its_own_process(config: PrepareConfig, tmp_path: Path) -> None:
    """And not the one that has written the journal that it goes on from."""
    with pytest.raises(KeyboardInterrupt), attempt(tmp_path / "data", {}, resume=True) as first:
        first.record({"cursor": [0, 1]})
        raise KeyboardInterrupt
    journal = tmp_path / ".data.partial" / output.JOURNAL_NAME
    journal.write_text(journal.read_text().replace(f"process {os.getpid()} ", "process 1 "))
    with attempt(tmp_path / "data", {}, resume=True) as second:
        assert second.journal
        assert second.journal["cursor"] == [0, 1]
        with pytest.raises(DataError, match=rf"right now \(process {os.getpid()} on "):
            prepare(config)
