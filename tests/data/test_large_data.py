"""Nine billion tokens in eight million documents, as OpenWebText has, in sparse files: what a run costs to start."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import REPOSITORY

from data_prep.indexed import bin_path, idx_path, index_bytes
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, ShardEntry, SplitEntry, TokenizerEntry, probe_sha256

SHARDS, DOCUMENTS, TOKENS = 18, 444_444, 1_125  # documents of a shard, and tokens of each: 500 million a shard

MEASURE = """
import json, sys
from pathlib import Path
from kraken_train.data.dataset import TrainingData

def mib(file, name):  # of this process
    fields = dict(line.split(":") for line in open(file))
    return int(fields[name].split()[0]) / (1024 if fields[name].endswith(" kB\\n") else 2**20)

def used():  # of this process alone; pages of the files that it maps are the system's
    return mib("/proc/self/status", "RssAnon")

def seen():  # of files: read, or mapped and touched
    return mib("/proc/self/io", "rchar") + mib("/proc/self/status", "RssFile")

def calls(function, *arguments):  # of Python's functions and of what they call in C
    count = 0
    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")
    sys.setprofile(counted)
    result = function(*arguments)
    sys.setprofile(None)
    return count, result

folder, context = Path(sys.argv[1]), int(sys.argv[2])
memory, files = used(), seen()
check, data = calls(TrainingData, {folder: 1})
order, samples = calls(data.samples, context, 1)
first, _ = calls(samples.batch, range(8))
resume = sum(calls(samples.batch, range(start, start + 8))[0] for start in (3_000_000, 10**9))
print(json.dumps({"samples": samples.orders[0].num_samples, "check_calls": check, "order_calls": order + first,
                  "resume_calls": resume, "order_mib": used() - memory, "seen_mib": seen() - files}))
"""


def write_sparse_set(folder: Path) -> None:
    (folder / TOKENIZER_FOLDER).mkdir(parents=True)
    index = index_bytes(np.full(DOCUMENTS, TOKENS), np.dtype("<u2"))
    shards = []
    for number in range(SHARDS):
        prefix = folder / f"train_{number:05d}"
        idx_path(prefix).write_bytes(index)
        with bin_path(prefix).open("wb") as file:
            file.truncate(2 * DOCUMENTS * TOKENS)
        shards.append(
            ShardEntry(
                name=prefix.name,
                documents=DOCUMENTS,
                tokens=DOCUMENTS * TOKENS,
                bin_bytes=2 * DOCUMENTS * TOKENS,
                bin_sha256="not computed",
                idx_sha256=hashlib.sha256(index).hexdigest(),
                bin_probe_sha256=probe_sha256(bin_path(prefix)),
            )
        )
    tokenizer = TokenizerEntry("gpt2", 50257, 50256, {})
    Manifest(tokenizer, "uint16", {"train": SplitEntry(shards, 0)}, {}, {}).save(folder)


def test_nine_billion_tokens(tmp_path: Path) -> None:
    write_sparse_set(tmp_path / "data")
    for context in (1024, 256):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "data"), str(context)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["samples"] == (SHARDS * DOCUMENTS * TOKENS - 1) // context
        # The indices, of 153 MiB, are read for their checksums, and next to nothing of the 18 GB of tokens; no call is
        # made for each document or sample.
        assert found["check_calls"] < DOCUMENTS
        assert found["order_calls"] < 10_000
        assert found["resume_calls"] < 2_000
        assert found["order_mib"] < 100
        assert found["seen_mib"] < 300
    for path in (tmp_path / "data").glob("*.idx"):
        path.unlink()  # 160 MB
