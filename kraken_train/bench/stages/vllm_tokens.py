"""The tokens of a Kraken in vLLM, with the plugin of serving/vllm, on one rank and on several.

The same prompts are answered by one rank, and by several: whose ranks wait for each sum, whose sums run beside the
attention, and the same compiled and with CUDA graphs, which contain start and end of each sum. Where vLLM is not
installed the figures say so.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from checkpoints.exports.folder import write_export
from kraken_train.bench.stages.preset import VllmSizes
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.stages.stage import Figures
from kraken_train.bench.vllm_jobs import Call, Job, require_vllm, run_jobs
from kraken_train.common.errors import ConfigError
from kraken_train.model.config import KrakenConfig, ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model

WAITING, OVERLAPPED, COMPILED = WAYS = ("waiting for each sum", "overlapped", "overlapped, compiled, CUDA graphs")
PROMPTS, NEW_TOKENS = 16, 32


def same_tokens(way: str) -> str:
    return f"{way}: the tokens of one rank"


def measure(sizes: VllmSizes, calls: ModuleType) -> Measured:
    python = Path(sizes.python)
    try:
        version = require_vllm(python)
    except ConfigError as error:
        return Measured({same_tokens(way): str(error) for way in WAYS})
    return Measured({"vLLM": version, **token_figures(sizes, python)})


def token_figures(sizes: VllmSizes, python: Path) -> Figures:
    numbers, vocab_size = random.Random(0), 256
    config = KrakenConfig(
        num_sub_layers=sizes.ranks,
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        heads_per_sub_layer=sizes.hidden_size // 64,
        vocab_size=vocab_size,
        context_length=256,
    )
    prompts = [[numbers.randrange(vocab_size) for _ in range(1 + 13 * index)] for index in range(PROMPTS)]
    call: Call = [(prompt, NEW_TOKENS) for prompt in prompts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = lively_model(config).state_dict()
        write_export(folder / "export", config, weights, tokenizer_dir=None, metadata={}, dtype=torch.float32)

        def tokens(ranks: int, **settings: Any) -> list[list[int]]:
            """Raises RuntimeError where vLLM refuses."""
            common = {"model": str(folder / "export"), "dtype": "float32", "skip_tokenizer_init": True}
            job = Job({**common, "tensor_parallel_size": ranks, "enforce_eager": True, **settings}, [call])
            (outcome,) = run_jobs(python, [job], folder)
            if outcome.error is not None:
                raise RuntimeError(outcome.error)
            return outcome.answers[0].tokens

        expected = tokens(1)
        settings: dict[str, dict[str, Any]] = {WAITING: {"hf_overrides": {"overlap": False}}, OVERLAPPED: {}}
        if sizes.compiled:
            settings[COMPILED] = {"enforce_eager": False}
        figures: Figures = {same_tokens(way): tokens(sizes.ranks, **more) == expected for way, more in settings.items()}
    return {same_tokens(way): "left out" for way in WAYS} | figures


def lively_model(config: ModelConfig) -> LanguageModel:
    """With weights so large that the most likely token is far ahead of others, and differs from place to place."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.5 if "embedding" in name or "lm_head" in name else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(1 + 0.1 * noise if "norm" in name else scale * noise)
    return model
