"""The softmax over the vocabulary, summed in fp32 even where the model computes in bf16.

These functions are compiled as they stand, one kernel each. Shapes: C tokens, v rows of the vocabulary here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The format of sums over the vocabulary."""
    return torch.promote_types(dtype, torch.float32)


def log_sums(logits: Tensor) -> Tensor:
    """(C, v) -> log sum exp (C,) of at least float32."""
    wide = at_least_fp32(logits.dtype)
    # PyTorch's log_softmax is one kernel that also widens; its logsumexp is several, and a copy.
    return logits[:, 0].to(wide) - logits.log_softmax(1, dtype=wide)[:, 0]


def probabilities(logits: Tensor, sums: Tensor, factors: Tensor | None) -> Tensor:
    """(C, v), (C,), (C,) -> factors exp(logits - sums), in the type of the logits.

    Overwrites the logits where `sums` has their type too.
    """
    exponentials = logits.to(sums.dtype).sub_(sums[:, None]).exp_()
    return (exponentials if factors is None else exponentials.mul_(factors[:, None])).to(logits.dtype)
