"""`deterministic=true`: the same training on the same devices gives the same bits, also after a kill and a resumption.

What makes a GPU's results differ between two runs, and what is done about it:

- cuBLAS shares its workspace between streams unless CUBLAS_WORKSPACE_CONFIG fixes it, before CUDA starts.
- Operations that add with atomics: `torch.use_deterministic_algorithms` takes another algorithm (FlashAttention's and
  the memory-efficient attention's backward pass, gathers and scatters) or raises an error. cuDNN's attention has no
  other one, so PyTorch leaves it out.
- Kernels that are chosen by timing: cuDNN's benchmark is off, and Inductor chooses by rules, which
  `use_deterministic_algorithms` sets too; also for FlexAttention, whose kernels use no atomics.
- NCCL's sums have a fixed order on the same ranks, but for those within the switch (NVLS), which Megatron-LM's
  `--deterministic-mode` excludes as well.
- Our Triton kernels have neither atomics nor choices by timing; DeepSpeed's `overlap_comm` is always off.

On a CPU the bits are the same in any case, given the same number of threads; the setting works there too.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch

from kraken_train.common.errors import ConfigError
from kraken_train.config import TrainConfig

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_CHOICES = (":4096:8", ":16:8")  # with which cuBLAS promises equal bits; the first is the faster one
NVLS = "NCCL_NVLS_ENABLE"
NCCL_ALGORITHM = "NCCL_ALGO"
NONE_EXISTS = "does not have a deterministic implementation"  # in PyTorch's message
OFF = "or deterministic=false"


def prepare_deterministic(config: TrainConfig, device_type: str, environment: MutableMapping[str, str]) -> None:
    """Check that a training on devices of this type can be deterministic, and set what cuBLAS and NCCL read from the
    environment. To be called before CUDA starts. Raises ConfigError.
    """
    if device_type != "cuda":
        return
    if environment.setdefault(CUBLAS, CUBLAS_CHOICES[0]) not in CUBLAS_CHOICES:
        raise ConfigError(
            f"deterministic=true, but the environment has {CUBLAS}={environment[CUBLAS]}, with which cuBLAS does not "
            f"promise equal bits; unset it, use {' or '.join(CUBLAS_CHOICES)}, {OFF}"
        )
    if environment.setdefault(NVLS, "0") != "0":
        raise ConfigError(
            f"deterministic=true, but the environment has {NVLS}={environment[NVLS]}, and NCCL promises no order of "
            f"sums within the switch; unset it, use 0, {OFF}"
        )
    algorithms = environment.get(NCCL_ALGORITHM, "")
    if "NVLS" in algorithms.upper() and not algorithms.startswith("^"):
        raise ConfigError(
            f"deterministic=true, but the environment has {NCCL_ALGORITHM}={algorithms}, and NCCL promises no order of "
            f"sums within the switch; unset it, use Ring or Tree, {OFF}"
        )
    compiled = {"engine.compile": config.engine.compiles(device_type),
                "attention_within_documents": config.attention_within_documents}  # fmt: skip
    setting = next((name for name, holds in compiled.items() if holds), None)
    # PyTorch 2.9 has no such mode. The module takes a second to import.
    if setting is not None and not hasattr(importlib.import_module("torch._inductor.config"), "deterministic"):
        raise ConfigError(
            f"deterministic=true with {setting}=true: the compiler of PyTorch {torch.__version__} chooses kernels by "
            f"their time, which may be another at each start; install a newer PyTorch, use {setting}=false, {OFF}"
        )


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """If `enabled`, a context of deterministic algorithms. Raises ConfigError for an operation that has none."""
    if not enabled:
        yield
        return
    utilities: Any = torch.utils.deterministic
    filled, chosen_by_time = utilities.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    utilities.fill_uninitialized_memory = False  # takes a pass over all new memory, and nothing reads it unwritten
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)  # Inductor's, too
    try:
        yield
    except RuntimeError as error:
        if NONE_EXISTS not in str(error):
            raise
        operation = str(error).partition(NONE_EXISTS)[0].strip()
        raise ConfigError(
            f"deterministic=true, but {operation} has no deterministic implementation on this device; use "
            "deterministic=false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = chosen_by_time
        utilities.fill_uninitialized_memory = filled
