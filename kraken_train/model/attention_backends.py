"""Which of PyTorch's kernels `scaled_dot_product_attention` may take, by what it is used for.

On H100 and B200 PyTorch takes cuDNN's attention first. That is the fastest, but it makes a plan for every new shape,
which takes 0.4 s and more on the CPU, and keeps it for that thread. Training has one shape, and so have CUDA graphs:
they keep PyTorch's order. Prompts and texts of any length take FlashAttention, which plans nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def attention_of_any_shape(device: torch.device) -> Iterator[None]:
    """Within it attention on `device` makes no plans for shapes. Elsewhere than on a GPU nothing changes."""
    if not plans_shapes(device):
        yield
        return
    with sdpa_kernel(WITHOUT_PLANS):
        yield


def plans_shapes(device: torch.device) -> bool:
    return device.type == "cuda"
