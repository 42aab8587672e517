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
import json, resource, sys, time
from pathlib import Path
import numpy as np
from kraken_train.data import TrainingData

def used():  # MiB of this process alone; pages of the files that it maps are the system's
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return int(fields["RssAnon"].split()[0]) / 1024

folder, context = Path(sys.argv[1]), int(sys.argv[2])
start, memory = time.perf_counter(), used()
data = TrainingData({folder: 1})
opened = time.perf_counter()
samples = data.samples(context, seed=1)
samples.batch(range(8))
first = time.perf_counter()
samples.batch(range(3_000_000, 3_000_008))
samples.batch(range(10**9, 10**9 + 8))
last = time.perf_counter()
print(json.dumps({"samples": samples.orders[0].num_samples, "check_s": opened - start, "order_s": first - opened,
                  "resume_s": last - first, "order_mib": used() - memory,
                  "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
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
        assert found["check_s"] + found["order_s"] < 5 and found["resume_s"] < 0.5
        assert found["order_mib"] < 100
    for path in (tmp_path / "data").glob("*.idx"):
        path.unlink()  # 160 MB
