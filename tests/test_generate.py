"""Generation: with and without the cache the same numbers, and settings that mean what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_ids, rough_model, run_here, small_configs, user_error, write_small_export
from torch import Tensor

from kraken_train.errors import CheckpointError, ConfigError
from kraken_train.generate import generate
from kraken_train.inference.kv_cache import make_caches
from kraken_train.inference.sampling import Sampling, draw
from kraken_train.model import KrakenModel

ARCHITECTURES = list(small_configs())
GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [7, 1, 1, 3]])
def test_cached_logits(architecture: str, dtype: torch.dtype, tolerance: float, chunks: list[int]) -> None:
    config = small_configs()[architecture]
    model, ids = rough_model(config, dtype), random_ids(config, 2, 12)
    caches, seen, pieces = make_caches(model, batch_size=2, capacity=12), 0, []
    for piece in ids.split(chunks, dim=1):
        pieces.append(model(piece, caches, torch.arange(seen, seen + piece.shape[1])))
        seen += piece.shape[1]
    expected = model(ids)
    assert (torch.cat(pieces, dim=1) - expected).abs().max() < tolerance * expected.abs().max()


def test_cache_size() -> None:
    config = small_configs()["kraken"]
    model = rough_model(config, torch.bfloat16)
    assert isinstance(model, KrakenModel)
    caches = make_caches(model, batch_size=5, capacity=11)
    assert len(caches) == config.num_layers
    assert caches[0].keys.shape == caches[0].values.shape == (3 * 5, 2, 11, 8)
    assert caches[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_is_the_argmax_of_the_whole_forward(architecture: str, dtype: torch.dtype) -> None:
    config = small_configs()[architecture]
    model, prompt = rough_model(config, dtype), random_ids(config, 3, 5)
    cached = generate(model, prompt, 10, GREEDY)
    assert torch.equal(cached, generate(model, prompt, 10, GREEDY, use_cache=False))
    expected = prompt
    for _ in range(10):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_in_bf16(architecture: str, use_cache: bool) -> None:
    """Each token is the most likely one after those before it, up to bf16's rounding: equal logits are common."""
    config = small_configs()[architecture]
    model = rough_model(config, torch.bfloat16)
    ids = generate(model, random_ids(config, 3, 5), 19, GREEDY, use_cache=use_cache).clone()
    logits = model.double()(ids[:, :-1])[:, 4:]
    chosen = logits.gather(-1, ids[:, 5:, None])[..., 0]
    behind = (logits.max(dim=-1).values - chosen) / logits.abs().amax(dim=-1)
    assert behind.max() < 0.03
    assert (behind == 0).double().mean() > 0.8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampling_follows_the_seed(architecture: str) -> None:
    config = small_configs()[architecture]
    model, prompt = rough_model(config), random_ids(config, 2, 4)

    def run(seed: int, use_cache: bool = True) -> Tensor:
        return generate(model, prompt, 12, Sampling(temperature=5.0, seed=seed), use_cache=use_cache)

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(1, use_cache=False))
    assert not torch.equal(run(1), run(2))


def test_the_whole_context_can_be_used() -> None:
    config = small_configs()["kraken"]
    model = rough_model(config)
    assert generate(model, random_ids(config, 1, 1), 23, GREEDY).shape == (1, 24)


def test_end_of_document_stops_a_row_and_then_all() -> None:
    config = small_configs()["kraken"]
    model, prompts = rough_model(config), random_ids(config, 2, 4)
    free = generate(model, prompts, 8, GREEDY)
    end = int(free[0, 6])  # the first row's third new token
    stopped = generate(model, prompts, 8, GREEDY, end_of_document=end)
    first = [int(i) for i in free[0, 4:]].index(end)
    assert torch.equal(stopped[0, : 4 + first + 1], free[0, : 4 + first + 1])
    assert (stopped[0, 4 + first :] == end).all()
    alone = generate(model, prompts[:1], 8, GREEDY, end_of_document=end)
    assert alone.shape[1] == 4 + first + 1


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    config = small_configs()["kraken"]
    model = rough_model(config)
    ids = generate(model, torch.zeros(1, 1, dtype=torch.int64), 20, Sampling(temperature=100.0), vocab_size=5)
    assert ids.max() < 5


def test_limits_of_sampling() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)

    def check(*expected: float, **settings: float) -> None:
        sampling = Sampling(seed=3, **settings)  # type: ignore[arg-type]
        drawn = draw(logits, sampling, sampling.generator())
        for i, probability in enumerate(expected):
            frequency = float((drawn == i).float().mean())
            assert frequency == probability or (abs(frequency - probability) < 0.04 and 0 < probability < 1)

    check(0.5, 0.3, 0.15, 0.05)
    check(1, 0, 0, 0, top_k=1)
    check(0.625, 0.375, 0, 0, top_k=2)
    check(0.5, 0.3, 0.15, 0.05, top_k=9)
    check(1, 0, 0, 0, top_p=0.4)
    check(0.625, 0.375, 0, 0, top_p=0.6)
    check(0.5, 0.3, 0.15, 0.05, top_p=1.0)
    check(1, 0, 0, 0, top_k=2, top_p=0.6)
    check(1, 0, 0, 0, temperature=0.01)
    check(0.685, 0.247, 0.062, 0.007, temperature=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0 and less than"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be at least 0 and less than"),
        ({"top_k": 0}, "top_k=0 must be greater than 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be greater than 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be greater than 0 and at most 1"),
    ],
)
def test_wrong_sampling(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_room_in_the_context() -> None:
    config = small_configs()["kraken"]
    model = rough_model(config)
    with pytest.raises(ConfigError, match=r"max_new_tokens=20 after a prompt of 5 tokens .* of 24; use at most 19"):
        generate(model, random_ids(config, 1, 5), 20, GREEDY)
    with pytest.raises(ConfigError, match=r"prompt has 24 tokens.*context of 24; use at most 23"):
        generate(model, random_ids(config, 1, 24), 1, GREEDY)
    with pytest.raises(ConfigError, match="prompt has no tokens"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 1, GREEDY)


def test_a_diverged_model() -> None:
    config = small_configs()["kraken"]
    model = rough_model(config)
    torch.nn.init.constant_(model.final_norm.weight, torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, random_ids(config, 1, 4), 2, GREEDY)


def test_command(tmp_path: Path, tokenizer_dir: Path) -> None:
    config = small_configs(vocab_size=384, context_length=64)["kraken"]
    write_small_export(tmp_path / "an export, (1)", config, tokenizer_dir)
    base = [f"export_dir={tmp_path / 'an export, (1)'}", "max_new_tokens=8"]
    prompt = "Once, (upon) a ${time}\\"

    def run(*settings: str) -> str:
        result = run_here("kraken_train.generate", *base, *settings)
        assert result.returncode == 0, result.stderr
        return result.stdout

    sampled = run(f"prompt={prompt}", "seed=3")
    assert sampled.startswith(prompt) and len(sampled) > len(prompt) + 1
    assert run(f"prompt={prompt}", "seed=3", "use_cache=false") == sampled
    too_long = user_error(run_here("kraken_train.generate", *base, f"prompt={prompt * 9}"))
    assert "leaves no room in the model's context of 64" in too_long
