"""On a GPU: CUDA graphs and compilation change nothing but the time."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, rough_model, small_configs
from torch import Tensor

from kraken_train.inference import generation
from kraken_train.inference.engine import ExecutionConfig, InferenceEngine
from kraken_train.inference.generation import continue_prompts
from kraken_train.inference.sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIGS = small_configs(context_length=72)
BATCHES = [[5, 1, 7, 3], [2, 3], [9, 2, 2, 2]]  # lengths of prompts: padded to 8, to 4, and not
STEPS = 20


def logits_of(engine: InferenceEngine, ids: Tensor, lengths: list[int]) -> list[Tensor]:
    batch = len(lengths)
    logits = [engine.prefill(ids[:batch, : max(lengths)], torch.tensor(lengths))]
    for step in range(STEPS):
        logits.append(engine.decode(ids[range(batch), [length + step for length in lengths]]))
    return logits


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits(architecture: str, compiled: bool) -> None:
    config = CONFIGS[architecture]
    torch._dynamo.reset()
    ids = random_ids(config, 4, 72)
    whole = rough_model(config, torch.float64)(ids).detach()
    model = rough_model(config, torch.float32).cuda()
    execution = ExecutionConfig(compile=compiled, cuda_graphs=True, prefill_lengths=(4, 8))
    engine = InferenceEngine(model, 4, 40, execution)
    for lengths in BATCHES:
        found = logits_of(engine, ids, lengths)  # kept: a later replay must not write into what an earlier one gave
        for step, logits in enumerate(found):
            expected = whole[range(len(lengths)), [length - 1 + step for length in lengths]]
            assert (logits.cpu() - expected).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("architecture", ["kraken", "standard-gqa"])
def test_texts(architecture: str) -> None:
    """Drawn on the GPU as on the CPU."""
    model = rough_model(CONFIGS[architecture], torch.float64)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    sampling = Sampling(temperature=2.0, seed=3)
    expected = continue_prompts(InferenceEngine(model, 3, 30), prompts, 20, sampling)
    engine = InferenceEngine(model.cuda(), 3, 30, ExecutionConfig(cuda_graphs=True, prefill_lengths=(8,)))
    assert continue_prompts(engine, prompts, 20, sampling) == expected


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(2.0, top_k=20, top_p=0.9)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_nothing_waits_for_the_device(sampling: Sampling, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the prompts and the one read of all tokens."""
    model = rough_model(CONFIGS["kraken"], torch.float32).cuda()
    engine = InferenceEngine(model, 2, 40, ExecutionConfig(cuda_graphs=graphs, prefill_lengths=(8,)))
    prompts, read, reads = [[3, 1, 4], [1, 5, 9, 2, 6]], generation.read, []
    expected = continue_prompts(engine, prompts, 20, sampling, tokens_per_read=1)
    read_prompts = engine.read_prompts

    def strict_from_here(*arguments: Tensor) -> Tensor:
        hidden = read_prompts(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        return hidden

    def relaxed(unread: list[Tensor]) -> list[list[int]]:
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(unread))
        return read(unread)

    monkeypatch.setattr(engine, "read_prompts", strict_from_here)
    monkeypatch.setattr(generation, "read", relaxed)
    try:
        assert continue_prompts(engine, prompts, 20, sampling, tokens_per_read=20) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == [20]


def test_gpu_attention_kernels_serve_new_tokens() -> None:
    """Neither a mask in odd places nor grouped heads make attention fall back to the slow general form."""
    config = CONFIGS["kraken-gqa"]
    engine = InferenceEngine(rough_model(config, torch.bfloat16).cuda(), 2, 37)
    backends = [torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    with torch.nn.attention.sdpa_kernel(backends):
        engine.prefill(random_ids(config, 2, 5), torch.tensor([5, 2]))
        assert engine.decode(torch.tensor([1, 2])).isfinite().all()
