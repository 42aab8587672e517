"""Documents apart on a GPU: both kernels against the mask, without a bit that leaks and without waiting."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, rough_model
from model.test_documents import END, compare_kernel

from kraken_train.model.config import KrakenConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = KrakenConfig(4, 3, hidden_size=64, heads_per_sub_layer=2, vocab_size=96, context_length=400)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("flex", torch.float32),
        ("flex", torch.bfloat16),
        ("varlen", torch.bfloat16),
        ("mask", torch.float32),
        ("mask", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("groups", [4, 2])
def test_kernels(kernel: str, dtype: torch.dtype, groups: int) -> None:
    compare_kernel(kernel, groups, torch.device("cuda"), dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_leaks(dtype: torch.dtype, compiled: bool) -> None:
    """The forward pass; sums of gradients may be in any order on a GPU."""
    model = rough_model(CONFIG, dtype).cuda()
    model.end_of_document = END
    if compiled:
        model.compile_parts()
    ids = random_ids(CONFIG, 2, 400).cuda()
    ids[:, 170] = END
    changed = ids.clone()
    changed[:, :170] = ids[:, :170].flip(1)
    with torch.no_grad():
        assert torch.equal(model(ids)[:, 170:], model(changed)[:, 170:])


def test_no_wait_for_the_device() -> None:
    model = rough_model(CONFIG, torch.bfloat16).cuda()
    model.end_of_document = END
    ids = random_ids(CONFIG, 2, 400).cuda()
    model.loss(ids, ids).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(ids, ids).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
