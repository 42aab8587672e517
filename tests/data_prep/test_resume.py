"""Whatever ends an attempt and however often, the same command ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from data_helpers import make_texts, write_jsonl
from helpers import PATIENCE, wait_for_stop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_prep import files, shard_builder
from data_prep.hash_set import SeenHashes
from data_prep.indexed import ShardWriter
from data_prep.manifest import verify_quick
from data_prep.output import Attempt
from data_prep.prepare import PrepareConfig, prepare
from data_prep.verify import verify
from kraken_train.common.errors import DataError
from kraken_train.common.settings import from_dict

ROOT = Path(__file__).resolve().parents[2]
Configure = Callable[..., PrepareConfig]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that needs no training: a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<end>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many blocks, and each is a piece."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 300)
    monkeypatch.setattr(shard_builder, "PIECE_SECONDS", 0.0)
    return


@pytest.fixture
def configure(tmp_path: Path, byte_tokenizer: Path) -> Configure:
    def make(source: Path, name: str = "data", **changes: Any) -> PrepareConfig:
        tokenizer = {"kind": "huggingface", "path": str(byte_tokenizer), "end_of_document": "<end>"}
        base = {"source": str(source), "output_dir": str(tmp_path / name), "tokenizer": tokenizer, "num_workers": 0}
        return from_dict(base | {"validation_fraction": 0.2, "shard_tokens": 2000} | changes, PrepareConfig)

    return make


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed_at(point: int, config: PrepareConfig) -> bool:
    """Run an attempt in a process that kills itself at its `point`-th change of a file; False if it gets through."""
    pid = os.fork()
    if pid == 0:
        left = point

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (ShardWriter, "_write"), (Path, "unlink"),
                             (Path, "replace"), (os, "unlink")):  # fmt: skip
            setattr(module, name, dying(getattr(module, name)))
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            prepare(config)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


TEXT = st.text(st.sampled_from("ab \n▁é日🦑\u0301"), max_size=40)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    texts=st.lists(TEXT, min_size=1, max_size=30),
    kills=st.lists(st.integers(1, 60), max_size=3),
    changes=st.fixed_dictionaries(
        {
            "shard_tokens": st.sampled_from([10, 100, 10_000]),
            "drop_duplicates": st.booleans(),
            "min_length": st.sampled_from([1, 5]),
            "max_documents": st.sampled_from([None, 3, 20]),
            "normalization": st.sampled_from(["none", "NFC"]),
            "append_end_of_document": st.booleans(),
        }
    ),
)
def test_random_documents_and_random_kills(
    texts: list[str], kills: list[int], changes: dict[str, Any], configure: Configure, small_pieces: None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "a.jsonl", [*texts, "there is a text for training", "and another one"])
        changes = {**changes, "validation_fraction": 0.0}
        expected_config = configure(source, output_dir=f"{folder}/whole", **changes)
        config = configure(source, output_dir=f"{folder}/killed", **changes)
        prepare(expected_config)
        for point in kills:
            killed_at(point, config)
        prepare(config)
        assert content(Path(folder) / "killed") == content(Path(folder) / "whole")
        assert sorted(os.listdir(folder)) == ["a.jsonl", "killed", "whole"]
        verify(Path(folder) / "killed")


def test_every_kill_point(configure: Configure, tmp_path: Path, small_pieces: None) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(12) * 2)
    changes = {"drop_duplicates": True, "shard_tokens": 700}
    prepare(configure(source, "whole", **changes))
    config = configure(source, "killed", **changes)
    point = attempts = 1
    while killed_at(point, config):  # each attempt goes on where the one before was killed, a little later each time
        point += 1
        attempts += 1
        assert attempts < 500
    prepare(config)
    assert attempts > 20
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_workers_change_nothing(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 2000)
    texts = make_texts(300) + make_texts(40)
    random.Random(0).shuffle(texts)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.write_text(source.read_text().replace("\n", "\nbroken\n\n", 5))
    for workers in (0, 1, 3):
        changes = {"drop_duplicates": True, "max_documents": 250, "on_bad_record": "skip", "normalization": "NFKC"}
        manifest = prepare(configure(source, f"{workers}", num_workers=workers, **changes))
    assert manifest.documents == 250
    assert set(manifest.skipped) == {"duplicate", "the line is not JSON"}
    assert content(tmp_path / "1") == content(tmp_path / "3") == content(tmp_path / "0")


def test_a_killed_worker_is_named_and_loses_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 5000)
    monkeypatch.setattr("data_prep.workers.BYTES_IN_FLIGHT", 10_000)  # else the workers may have done all of it by then
    monkeypatch.setattr(shard_builder, "PIECE_SECONDS", 0.0)
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    config = configure(source, num_workers=2, shard_tokens=50_000)
    partial = tmp_path / ".data.partial"

    record, left = Attempt.record, 20
    others = set(psutil.Process().children())  # of the whole suite, some of them spawned as workers are

    def killing(self: Attempt, state: dict[str, Any]) -> None:
        """The 20th of many records: the main process is busy with it, and most of the work lies ahead."""
        nonlocal left
        left -= 1
        if left == 0:
            started = set(psutil.Process().children()) - others
            worker = next(process for process in started if "spawn_main" in " ".join(process.cmdline()))
            worker.kill()
        record(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "record", killing)
        with pytest.raises(DataError, match=r"a worker process died \(signal 9, Killed\).*the same command continues"):
            prepare(config)
    assert partial.is_dir()
    assert not (tmp_path / "data").exists()
    prepare(configure(source, num_workers=0, shard_tokens=50_000))
    monkeypatch.setattr(shard_builder, "PIECE_SECONDS", 10.0)
    prepare(configure(source, "whole", shard_tokens=50_000))
    assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_a_full_disk_loses_nothing(
    configure: Configure, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    record, left = Attempt.record, 8

    def full(self: Attempt, state: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        record(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "record", full)
        with pytest.raises(DataError, match=r"is full .*what is finished is kept in .*\.data\.partial, and the same"):
            prepare(configure(source))
    prepare(configure(source))
    prepare(configure(source, "whole"))
    assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_a_disk_that_is_full_from_the_start_keeps_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DataError, match=r"the disk of output_dir=.*/data is full .No space.*nothing was left there"
        ):
            prepare(configure(source))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def interrupted(configure: Configure, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that ends at its third piece."""
    record, left = Attempt.record, 4

    def interrupt(self: Attempt, state: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        record(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(configure(source))


def test_other_settings_are_refused_or_start_anew(
    configure: Configure, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    interrupted(configure, source, monkeypatch)
    before = content(tmp_path / ".data.partial")
    with pytest.raises(DataError, match=r"shard_tokens is 2000 there and 3000 here\); repeat that .* resume=false"):
        prepare(configure(source, shard_tokens=3000))
    assert content(tmp_path / ".data.partial") == before
    prepare(configure(source, shard_tokens=3000, resume=False))
    assert "continuing after" not in capsys.readouterr().out
    prepare(configure(source, "whole", shard_tokens=3000))
    assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_a_changed_source_is_refused(
    configure: Configure, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    interrupted(configure, source, monkeypatch)
    source.write_text(source.read_text() + '{"text": "new"}\n')
    with pytest.raises(DataError, match=r"had another request \(source.bytes is"):
        prepare(configure(source))


COMMAND = (
    "import sys, data_prep.shard_builder as a, data_prep.files as f, data_prep.prepare as p; "
    "a.PIECE_SECONDS = 0; f.BLOCK_BYTES = 20_000; "
    "from kraken_train.common.cli import run_entry; run_entry(p.prepare, p.PrepareConfig, 'prepare')"
)
# The same, stopped after the first piece that ends behind a whole shard: much is done, and much is left to do.
# SIGINT as in a terminal's foreground, even where these tests run in the background, which ignores it.
STOPPING = """
import os, signal
from data_prep.output import Attempt
signal.signal(signal.SIGINT, signal.default_int_handler)
def stopping(self, state, record=Attempt.record):
    record(self, state)
    if (self.folder / "train_00001.bin").exists():
        Attempt.record = record
        os.kill(os.getpid(), signal.SIGSTOP)
Attempt.record = stopping
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_the_command_killed_or_interrupted(
    configure: Configure, tmp_path: Path, byte_tokenizer: Path, ending: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 20_000)
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(10_000))
    prepare(configure(source, "whole", shard_tokens=200_000, validation_fraction=0.005))
    arguments = [f"source={source}", "tokenizer=huggingface", f"tokenizer.path={byte_tokenizer}", "num_workers=2",
                 "tokenizer.end_of_document=<end>", "shard_tokens=200_000", f"output_dir={tmp_path}/data"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING + COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_stop(process)
    children = psutil.Process(process.pid).children()
    if ending == signal.SIGINT:  # as a terminal does it: to all of the group
        os.killpg(process.pid, ending)
        process.send_signal(signal.SIGCONT)
    else:
        process.send_signal(ending)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; the same command continues" in errors
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    assert not (tmp_path / "data").exists()
    command = [sys.executable, "-c", COMMAND, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "continuing after the" in result.stdout
    assert verify_quick(tmp_path / "data").documents == 10_000
    assert content(tmp_path / "data") == content(tmp_path / "whole")


@settings(max_examples=50)
@given(batches=st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1)), max_size=20))
def test_seen_hashes_are_a_set(batches: list[list[int]]) -> None:
    seen, known = SeenHashes(), set()
    for batch in batches:
        new = seen.add(np.array(batch, dtype=np.uint64))
        for key, is_new in zip(batch, new, strict=True):
            assert is_new == (max(key, 1) not in known)
            known.add(max(key, 1))
    assert seen.count == len(known)


def test_seen_hashes_take_little_memory() -> None:
    seen, random_numbers = SeenHashes(), np.random.default_rng(0)
    for _ in range(100):
        assert seen.add(random_numbers.integers(0, 2**64, 10_000, dtype=np.uint64)).all()
    assert seen._slots.nbytes <= 16 * seen.count
