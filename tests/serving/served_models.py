"""The exports that the tests with vLLM serve, and what transformers and our engine make of their prompts."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from helpers import MODERN

from checkpoints.exports import modeling_kraken
from checkpoints.exports.folder import read_export, write_export
from kraken_train.bench.stages.vllm_tokens import lively_model
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.generation import continue_prompts
from kraken_train.inference.sampling import Sampling
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.track_config import TrackConfig

CONTEXT = 128
COMMON = {"vocab_size": 131, "context_length": CONTEXT, "num_layers": 3}
CONFIGS: dict[str, ModelConfig] = {
    "kraken": KrakenConfig(4, hidden_size=64, heads_per_sub_layer=2, **COMMON),
    "kraken-gqa": KrakenConfig(2, hidden_size=64, heads_per_sub_layer=4, kv_heads_per_sub_layer=2, **COMMON),
    "kraken-mqa": KrakenConfig(2, hidden_size=64, heads_per_sub_layer=2, kv_heads_per_sub_layer=1, **COMMON),
    # Heads of 24 are computed as 32.
    "kraken-modern": KrakenConfig(
        4, hidden_size=48, heads_per_sub_layer=2, head_dim=24, tie_embeddings=False, ffn_hidden_size=64,
        ffn_reads_stream=True, embedding_size=80, **COMMON, **MODERN,
    ),
    "kraken-wide": KrakenConfig(4, hidden_size=64, heads_per_sub_layer=2, embedding_size=96, **COMMON),
    "standard": GPTConfig(hidden_size=128, num_heads=4, **COMMON),
    "standard-modern": GPTConfig(
        hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=40, ffn_hidden_size=128, **COMMON, **MODERN
    ),
    "parallel": GPTConfig(hidden_size=128, num_heads=4, architecture="parallel", **COMMON),
    "parallel-mqa": GPTConfig(hidden_size=96, num_heads=4, num_kv_heads=1, architecture="parallel", **COMMON),
    "parallel-modern": GPTConfig(
        hidden_size=96, num_heads=4, ffn_hidden_size=128, architecture="parallel", tie_embeddings=False,
        **COMMON, **MODERN,
    ),
    "track": TrackConfig(4, hidden_size=64, heads_per_track=2, sync_every=2, **COMMON),
    "track-modern": TrackConfig(
        2, hidden_size=48, heads_per_track=2, head_dim=24, ffn_hidden_size=64, sync_every=1, **COMMON, **MODERN
    ),
    "ladder": LadderConfig(hidden_size=128, num_heads=4, **COMMON),
    "ladder-modern": LadderConfig(
        hidden_size=96, num_heads=4, num_kv_heads=2, ffn_hidden_size=128, ladder_layers=2, **COMMON, **MODERN
    ),
    "fal": FALConfig(hidden_size=128, num_heads=4, **COMMON),
    "fal-modern": FALConfig(hidden_size=96, num_heads=4, num_kv_heads=1, ffn_hidden_size=128, **COMMON, **MODERN),
}  # fmt: skip

Call = list[tuple[list[int], int]]  # prompts, each with a number of new tokens


def write_served(folder: Path, config: ModelConfig, tokenizer_dir: Path | None = None) -> Path:
    weights = lively_model(config).state_dict()
    write_export(folder, config, weights, tokenizer_dir=tokenizer_dir, metadata={}, dtype=torch.float32)
    return folder


def unequal_prompts(count: int) -> Call:
    """Prompts of 1 to 96 tokens, of which the second half begins as the longest one does, with 1 to 32 new tokens."""
    numbers = random.Random(5)
    longest = [numbers.randrange(COMMON["vocab_size"]) for _ in range(96)]
    lengths = [1 + (7 * index) % 64 for index in range(count // 2)]
    fresh = [[numbers.randrange(COMMON["vocab_size"]) for _ in range(length)] for length in lengths]
    begun = [longest[: 33 + (11 * index) % 64] for index in range(count - len(fresh))]
    return [(prompt, 1 + (5 * index) % 32) for index, prompt in enumerate([*fresh, *begun])]


def rounded_to_fp8(values: torch.Tensor) -> torch.Tensor:
    """With a scale for each row, by which its largest value is the largest of the type."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / largest
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def round_products(model: torch.nn.Module) -> None:
    """Weights of all linear maps but the head, and what goes into them."""
    for name, module in model.named_modules():
        kinds = (modeling_kraken.StackedLinear, modeling_kraken.QKVLinear, torch.nn.Linear)
        if isinstance(module, kinds) and name != "lm_head":
            module.weight.data = rounded_to_fp8(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded_to_fp8, inputs)))


def of_transformers(folder: Path, call: Call, in_fp8: bool = False) -> list[list[int]]:
    """The most likely tokens, each prompt alone."""
    model = modeling_kraken.KrakenForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if in_fp8:
        round_products(model)
    answers = []
    for prompt, tokens in call:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def of_our_engine(folder: Path, call: Call) -> list[list[int]]:
    """The most likely tokens, all prompts in one batch."""
    engine = InferenceEngine(read_export(folder).load_model(), len(call), CONTEXT)
    most = max(tokens for _, tokens in call)
    rows = continue_prompts(engine, [prompt for prompt, _ in call], most, Sampling(temperature=0))
    return [row[len(prompt) :][:tokens] for row, (prompt, tokens) in zip(rows, call, strict=True)]
