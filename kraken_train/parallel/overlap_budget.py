"""How a sum that is under way and the attention that hides it share a GPU's multiprocessors.

A persistent GEMM starts a block on each multiprocessor. Where NCCL's kernel occupies some, the blocks that find no
place run after all others, and the GEMM takes twice as long (pytorch/pytorch#143988). So NCCL's kernels of a model
copy get a limit, and GEMMs leave as many multiprocessors free, only while a sum is under way.

PyTorch hands the number that is left to cuBLASLt, and not to cuBLAS, which is otherwise its first choice. cuBLASLt
takes it as the size for which it chooses a kernel; on Hopper GPUs that is the number of blocks as well.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Both functions warn that they are experimental.
warnings.filterwarnings("ignore", message="Setting the SM carveout for matmuls is a temporary")
warnings.filterwarnings("ignore", message="torch.backends.cuda.preferred_blas_library is an experimental feature")

GROUP_TIMEOUT = timedelta(minutes=30)  # PyTorch's own of a group with gloo and NCCL


@dataclass(frozen=True)
class OverlapBudget:
    max_ctas: int = 0  # the most blocks, each on a multiprocessor, of an NCCL kernel of a model copy; 0: NCCL's choice
    sm_carveout: int = 0  # multiprocessors that GEMMs leave free while a sum of a model copy is under way


NO_BUDGET = OverlapBudget()
# By the major compute capability: 16 blocks are what NCCL takes on an H100 with NVLink SHARP. Not measured here yet.
BY_CAPABILITY = {9: OverlapBudget(max_ctas=16, sm_carveout=16)}


def choose_budget(max_ctas: int | None, sm_carveout: int | None, device: torch.device, ranks: int) -> OverlapBudget:
    """The budget of `ranks` that share a model copy, each on such a device. None: by the device."""
    if device.type != "cuda" or ranks == 1:
        return NO_BUDGET
    usual = BY_CAPABILITY.get(torch.cuda.get_device_capability(device)[0], NO_BUDGET)
    return OverlapBudget(
        usual.max_ctas if max_ctas is None else max_ctas, usual.sm_carveout if sm_carveout is None else sm_carveout
    )


def group_options(budget: OverlapBudget) -> Any:
    """NCCL's options for the process group of a model copy; None: as PyTorch makes them."""
    if budget.max_ctas == 0:
        return None
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = GROUP_TIMEOUT
    options.config.max_ctas = budget.max_ctas
    return options


class Carveout:
    """GEMMs that are launched between `begin` and `end` leave `multiprocessors` free; 0: nothing happens."""

    def __init__(self, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors
        self.sums = 0  # under way

    def begin(self) -> None:
        self.sums += 1
        if self.sums == 1 and self.multiprocessors:
            self.library = torch.backends.cuda.preferred_blas_library()
            torch.backends.cuda.preferred_blas_library("cublaslt")
            torch._C._set_sm_carveout_experimental(self.multiprocessors)

    def end(self) -> None:
        self.sums -= 1
        if self.sums == 0 and self.multiprocessors:
            torch._C._set_sm_carveout_experimental(None)
            torch.backends.cuda.preferred_blas_library(self.library)
