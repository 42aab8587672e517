"""The fused kernels on a GPU: against their twins, compiled, recomputed, captured, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, rough_model, small_configs
from kernels.cases import TOLERANCES, Case, differentiate, entry_cases, errors, ffn_cases, head_cases
from torch import Tensor

from kraken_train.bench.kernels import as_table, compare_kernels
from kraken_train.inference.engine import ExecutionConfig, InferenceEngine
from kraken_train.model.config import KrakenConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = small_configs(context_length=24)
CONFIGS = {
    "gelu": SMALL["kraken-gqa"],
    "swiglu": SMALL["kraken-modern"],
    "rope": SMALL["kraken-modern"].replace(qk_norm=False),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def cases_of(dtype: torch.dtype) -> list[Case]:
    """More tokens than programs that share them, an odd width and aligned ones, one sub-layer and several."""
    return [
        *entry_cases(4, 3, 700, 504, dtype, True, "cuda"),
        *entry_cases(1, 1, 33, 20, dtype, False, "cuda"),
        *entry_cases(6, 1, 50, 1024, dtype, True, "cuda"),
        *ffn_cases(4, 2, 65, 504, 1008, dtype, "cuda"),
        *ffn_cases(1, 1, 3, 20, 28, dtype, "cuda"),
        *head_cases(4, 2, 65, (3, 3, 3), 168, dtype, "cuda"),
        *head_cases(2, 2, 5, (4, 2, 2), 6, dtype, "cuda"),
    ]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_kernel_is_its_twin(dtype: torch.dtype, compiled: bool) -> None:
    from kraken_train.kernels.fused import FusedKernels  # noqa: PLC0415 (imports Triton)

    torch.backends.cuda.matmul.allow_tf32 = False
    for case in cases_of(dtype):
        if compiled and dtype == torch.float64:
            continue
        torch.compiler.reset()
        found = errors(case, FusedKernels, compiled)
        assert max(found.values()) < TOLERANCES[str(dtype)[6:]], (case.name, found)


def test_the_same_bits_every_time() -> None:
    from kraken_train.kernels.fused import FusedKernels  # noqa: PLC0415 (imports Triton)

    for case in cases_of(torch.bfloat16):
        first, second = (differentiate(getattr(FusedKernels, case.name), case) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), (case.name, name)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_kernels_is_the_same_model(name: str, recompute: bool, compiled: bool) -> None:
    config = CONFIGS[name]
    ids = random_ids(config, 3, 24).cuda()
    torch.compiler.reset()

    def gradients(dtype: torch.dtype, fused: bool) -> dict[str, Tensor]:
        model = rough_model(config, dtype).cuda()
        if fused:
            model.use_fused_kernels()
            model.recompute = recompute
            if compiled:
                model.compile_parts()
        loss = model.loss(ids, ids)
        loss.backward()
        return {"loss": loss.detach(), **{key: value.grad for key, value in model.named_parameters()}}

    expected = gradients(torch.float64, fused=False)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        found = gradients(dtype, fused=True)
        for key, value in expected.items():
            assert (found[key].double() - value).norm() < tolerance * value.norm(), (dtype, key)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_serving(compiled: bool) -> None:
    """With CUDA graphs, logits of prompts and of further tokens."""
    config = CONFIGS["rope"]
    ids = random_ids(config, 2, 12)
    whole = rough_model(config, torch.float64)(ids).detach()
    torch.compiler.reset()
    execution = ExecutionConfig(compile=compiled, cuda_graphs=True, prefill_lengths=(8,), fused_kernels=True)
    engine = InferenceEngine(rough_model(config, torch.float32).cuda(), 2, 16, execution)
    logits = [engine.prefill(ids[:, :8], torch.tensor([8, 8]))]
    logits += [engine.decode(ids[:, token]) for token in range(8, 12)]
    for place, found in enumerate(logits, start=7):
        assert (found.cpu() - whole[:, place]).abs().max() < 1e-4 * whole.abs().max()


def test_benchmark() -> None:
    """At the sizes of the paper's 125M model; prints the table."""
    config = KrakenConfig(4, 12, hidden_size=504, heads_per_sub_layer=3, vocab_size=50304, context_length=1024)
    comparisons = compare_kernels(config, 20, torch.device("cuda"))
    print(as_table(comparisons))
    assert all(one.seconds > 0 and one.twin_seconds > 0 for one in comparisons)
