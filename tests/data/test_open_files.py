"""More shards than the system lets a process have open at first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from data_prep.prepare import PrepareConfig, prepare
from kraken_train.common.settings import from_dict
from kraken_train.data.dataset import TrainingData

SHARDS = 120
PROGRAM = """
import resource, sys
from pathlib import Path
from data_prep.inspect import document_lengths
from data_prep.manifest import load_manifest
from data_prep.merge import merge
from data_prep.verify import verify
from kraken_train.data.dataset import TrainingData
from kraken_train.common.errors import DataError

data, soft, hard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
if soft == hard:  # what has one shard open at a time does with few
    verify(data)
    merge([data], data.with_name("merged"))
    document_lengths(data, load_manifest(data).splits["train"])
try:
    samples = TrainingData({data: 1}).samples(8, seed=0)
    print(len(samples.stream.shards), samples.batch(range(3)).tolist(), resource.getrlimit(resource.RLIMIT_NOFILE))
except DataError as error:
    print("error:", error)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(SHARDS))
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "source": str(folder / "a.jsonl"),
        "output_dir": str(folder / "data"),
        "validation_fraction": 0.0,
        "shard_tokens": 1,
        "num_workers": 0,
        "tokenizer": {"kind": "sentencepiece_model", "path": str(tokenizer_dir / "tokenizer.model")},
    }
    assert len(prepare(from_dict(settings, PrepareConfig)).splits["train"].shards) == SHARDS
    return folder / "data"


def run(data: Path, soft: int, hard: int) -> str:
    command = [sys.executable, "-c", PROGRAM, str(data), str(soft), str(hard)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_the_soft_limit_is_raised(data: Path) -> None:
    found = run(data, 60, 1000)
    expected = TrainingData({data: 1}).samples(8, seed=0).batch(range(3)).tolist()
    assert found.startswith(f"{SHARDS} {expected} ")
    soft = int(found.rpartition("(")[2].partition(",")[0])
    assert SHARDS < soft < 1000


def test_a_low_hard_limit_is_named(data: Path) -> None:
    message = run(data, 60, 60)
    assert message.startswith(
        f"error: the train shards of {data} are {SHARDS} files to have open, but this process may"
    )
    assert "this process may have 60 (ulimit -Hn)" in message
    assert "shard_tokens" in message
