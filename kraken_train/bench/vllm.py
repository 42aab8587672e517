"""Time to the first token and per output token in vLLM: python -m kraken_train.bench.vllm

The models of `kraken_train.bench.ttft` with random weights, each served by vLLM on as many ranks as its devices, with
the plugin of serving/vllm. Prompts of random tokens go in by vLLM's `LLM.generate`: its time with one new token is the
time to the first token, and what each further token adds is the time per output token. Both contain vLLM's scheduler
and what passes between its processes. A Kraken also runs so that its ranks wait for each AllReduce.

vLLM has an environment of its own (`python=`). The figures of our engine stand beside these where `ttft_file` names a
ttft.json with the same cases.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from checkpoints.exports.folder import CONFIG_FILE, describe
from kraken_train.bench.grid import LAYERS, REFERENCE, SIZES, architectures, layer_settings, model_config, require_axis
from kraken_train.bench.results import Case, geometric_mean, milliseconds, quartiles
from kraken_train.bench.vllm_figure import draw
from kraken_train.bench.vllm_jobs import Answer, Call, Job, require_vllm, run_jobs
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import replace_synced
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.validation import require_at_least, require_choice, require_positive
from kraken_train.model.architecture import ModelConfig

JSON_FILE, FIGURE_FILE = "vllm.json", "vllm.png"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARMUP_ROUNDS = 2
CaseKey = tuple[str, int, int, str]  # size, context, devices, architecture


@dataclass(frozen=True)
class VllmConfig:
    """See conf/vllm.yaml."""

    architectures: tuple[str, ...]  # values of model.architecture, which docs/models.md lists
    sizes: tuple[str, ...]  # of the standard Transformer: tiny, 1.3b, 6.7b, 13b, 65b, 175b
    contexts: tuple[int, ...]  # tokens of the prompt
    degrees: tuple[int, ...]  # devices, and sub-layers of the Kraken
    layers: str  # paper: those of GPT-2 | modern: those of conf/model/base/modern.yaml, in all architectures
    batch_size: int  # prompts at once
    output_tokens: int  # tokens after the prompt, for the time per output token
    vocab_size: int  # rows of the embedding
    repeats: int  # rounds that count; times are medians
    dtype: str  # bf16 | fp32
    eager: bool  # without torch.compile and CUDA graphs
    python: FilePath  # interpreter of an environment with vLLM and serving/vllm
    output_dir: FilePath  # folder for vllm.json and vllm.png
    ttft_file: FilePath | None = None  # ttft.json of kraken_train.bench.ttft, whose times the table shows too

    def validate(self) -> None:
        """Raises ConfigError."""
        for name in ("architectures", "sizes", "contexts", "degrees"):
            require_axis(name, getattr(self, name))
        for architecture in self.architectures:
            require_choice("architectures", architecture, architectures())
        for size in self.sizes:
            require_choice("sizes", size, tuple(SIZES))
        for name in ("contexts", "degrees"):
            for value in getattr(self, name):
                require_positive(name, value)
        require_choice("layers", self.layers, LAYERS)
        for name in ("batch_size", "vocab_size", "repeats"):
            require_positive(name, getattr(self, name))
        require_at_least("output_tokens", self.output_tokens, 2)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        if not self.output_dir:
            raise ConfigError("output_dir is empty; give output_dir=FOLDER")

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.contexts) + self.output_tokens


@dataclass(frozen=True)
class Served:
    """A model as it is run."""

    size: str
    degree: int
    model: ModelConfig
    overlap: bool  # false: the ranks wait for each all-reduce, also for those that could be hidden

    @property
    def name(self) -> str:
        return self.model.architecture if self.overlap else f"{self.model.architecture}, waiting"


@dataclass(frozen=True)
class Times:
    """Of one model in one case, in seconds."""

    served: Served
    case: Case
    first_token: tuple[float, float, float]  # lower quartile, median, upper quartile
    output_token: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        def with_quartiles(times: tuple[float, float, float]) -> dict[str, float]:
            return dict(zip(("low", "seconds", "high"), times, strict=True))

        return {
            "size": self.case.size,
            "context": self.case.context,
            "devices": self.case.degree,
            "architecture": self.served.model.architecture,
            "overlap": self.served.overlap,
            "parameters": self.served.model.num_parameters,
            "hidden_size": self.served.model.hidden_size,
            "head_dim": self.served.model.head_size,
            "ttft": with_quartiles(self.first_token),
            "time_per_output_token": with_quartiles(self.output_token),
        }


def models_of(config: VllmConfig) -> list[Served]:
    """In the order of sizes and degrees. Raises ConfigError."""
    found, layers = [], layer_settings(config.layers)
    for size, degree, name in itertools.product(config.sizes, config.degrees, config.architectures):
        model = model_config(name, SIZES[size], degree, config.vocab_size, config.capacity).replace(**layers)
        found.append(Served(size, degree, model, overlap=True))
        if model.overlaps_communication and degree > 1:
            found.append(Served(size, degree, model, overlap=False))
    return found


def calls_of(config: VllmConfig) -> Iterator[tuple[int, bool, Call]]:
    """(context, whether it counts, call): for each context in turns one with one new token and one with all."""
    numbers = random.Random(0)
    for context in config.contexts:
        prompts = [[numbers.randrange(config.vocab_size) for _ in range(context)] for _ in range(config.batch_size)]
        for round_number in range(WARMUP_ROUNDS + config.repeats):
            for tokens in (1, config.output_tokens):
                yield context, round_number >= WARMUP_ROUNDS, [(prompt, tokens) for prompt in prompts]


def settings_of(config: VllmConfig, served: Served, folder: Path) -> dict[str, Any]:
    """Of vllm.LLM. No prompt is read in pieces, and none is in the cache."""
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": str(DTYPES[config.dtype]).removeprefix("torch."),
        "tensor_parallel_size": served.degree,
        "max_model_len": config.capacity,
        "max_num_seqs": config.batch_size,
        "max_num_batched_tokens": max(config.batch_size * max(config.contexts), config.capacity),
        "enable_prefix_caching": False,
        "enforce_eager": config.eager,
        **({} if served.overlap else {"hf_overrides": {"overlap": False}}),
    }


def measure(config: VllmConfig, served: Served) -> list[Times]:
    """By a vLLM of its own. Raises ConfigError where vLLM refuses the model."""
    calls = list(calls_of(config))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        description = describe(served.model, {}, DTYPES[config.dtype])
        (folder / CONFIG_FILE).write_text(json.dumps(description), encoding="utf-8")
        job = Job(settings_of(config, served, folder), [call for _, _, call in calls])
        (outcome,) = run_jobs(Path(config.python), [job], folder)
    if outcome.error is not None:
        raise ConfigError(f"vLLM does not serve {served.name} of sizes={served.size}: {outcome.error}")
    counted = [(context, answer) for (context, counts, _), answer in zip(calls, outcome.answers, strict=True) if counts]
    return [times(config, served, context, [a for c, a in counted if c == context]) for context in config.contexts]


def times(config: VllmConfig, served: Served, context: int, answers: list[Answer]) -> Times:
    """Of answers in turns, with one new token and with all."""
    one, every = (np.array([answer.seconds for answer in answers[start::2]]) for start in (0, 1))
    case = Case(served.size, context, served.degree)
    return Times(served, case, quartiles(one), quartiles((every - one) / (config.output_tokens - 1)))


def read_own(path: str | None) -> dict[CaseKey, tuple[float, float]]:
    """Seconds to the first token and per output token of our engine, from a ttft.json. Raises ConfigError."""
    if path is None:
        return {}
    try:
        results = json.loads(Path(path).read_bytes())["results"]
        return {
            (r["size"], r["context"], r["devices"], r["architecture"]):
                (r["ttft"]["seconds"], r["time_per_output_token"]["seconds"])
            for r in results
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"ttft_file={path} is not a ttft.json of kraken_train.bench.ttft: {error}") from error


def as_table(results: list[Times], own: Mapping[CaseKey, tuple[float, float]], title: str) -> Table:
    table = Table(title=title)
    for name in ("size", "tokens", "devices", "architecture"):
        table.add_column(name, justify="left" if name in ("size", "architecture") else "right")
    columns = ["first token, ms", "over standard", "output token, ms", "over standard"]
    columns += ["our engine:\nfirst token, ms", "output token, ms"] if own else []
    for name in columns:
        table.add_column(name, justify="right")
    for case in dict.fromkeys(result.case for result in results):
        together = [result for result in results if result.case == case]
        for result in together:
            row = [case.size.upper(), str(case.context), str(case.degree), result.served.name]
            for kind in ("first_token", "output_token"):
                row += [milliseconds(getattr(result, kind)[1]), percent(speed_up(result, together, kind))]
            if own:
                key = (case.size, case.context, case.degree, result.served.model.architecture)
                row += [milliseconds(value) for value in own[key]] if key in own and result.served.overlap else ["", ""]
            table.add_row(*row)
        table.add_section()
    return table


def speed_up(result: Times, together: list[Times], kind: str) -> float | None:
    """How much faster than the standard Transformer of the same case: 0.36 is +36%; None for that itself."""
    for other in together:
        if other.served.model.architecture == REFERENCE and other is not result:
            return float(getattr(other, kind)[1] / getattr(result, kind)[1] - 1)
    return None


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def summarize(results: list[Times]) -> dict[str, dict[str, float]]:
    """Geometric means of the speed-ups over the standard Transformer, by name; empty where that was not run."""
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(result.served.name for result in results):
        for kind in ("first_token", "output_token"):
            found = [
                speed_up(result, [other for other in results if other.case == result.case], kind)
                for result in results
                if result.served.name == name
            ]
            ratios = [1 + value for value in found if value is not None]
            if ratios:
                summary.setdefault(name, {})[f"{kind}_speed_up_over_standard"] = geometric_mean(ratios) - 1
    return summary


def measure_all(config: VllmConfig) -> None:
    served, own = models_of(config), read_own(config.ttft_file)
    version = require_vllm(Path(config.python))
    folder = Path(config.output_dir)
    open_output(folder)
    title = f"vLLM {version}, {config.dtype}, {'eager' if config.eager else 'compiled'}, {config.batch_size} prompts"
    results: list[Times] = []
    for number, one in enumerate(served, start=1):
        results += measure(config, one)
        print(f"{number}/{len(served)}  {one.name}, {one.size.upper()}, {one.degree} devices", flush=True)
        record = {
            "vllm": version,
            "dtype": config.dtype,
            "eager": config.eager,
            "batch_size": config.batch_size,
            "output_tokens": config.output_tokens,
            "repeats": config.repeats,
            "summary": summarize(results),
            "results": [result.to_dict() for result in results],
        }
        replace_synced(folder / JSON_FILE, json.dumps(record, indent=2, allow_nan=False) + "\n")
    Console(width=None if Console().is_terminal else 160).print(as_table(results, own, title))
    bars = {kind: [(r.case, r.served.name, r.served.model.color, getattr(r, kind)[1]) for r in results]
            for kind in ("first_token", "output_token")}  # fmt: skip
    draw(bars, title, folder / FIGURE_FILE)


def main() -> None:
    run_entry(measure_all, VllmConfig, "vllm")


if __name__ == "__main__":
    main()
