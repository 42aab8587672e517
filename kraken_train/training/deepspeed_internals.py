"""DeepSpeed, the only file that imports it: what is replaced in it, and the private interfaces that are used.

Each private interface has a check at the start: `FINGERPRINTS` of the functions that are replaced or relied upon, and
`require_tested_layout` of the buffers that they leave. DeepSpeed promises nothing about them, and a change that nobody
notices would train with other gradients than those that are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from kraken_train.common.errors import ConfigError
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.training.muon import Muon

# DeepSpeed looks for its accelerator, and logs, while it is imported.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param as get_master_weight,
)
from deepspeed.utils import (  # noqa: E402
    safe_get_full_optimizer_state as get_optimizer_state,
)
from deepspeed.utils import (  # noqa: E402
    safe_set_full_fp32_param as set_master_weight,
)
from deepspeed.utils import (  # noqa: E402
    safe_set_full_optimizer_state as set_optimizer_state,
)

__all__ = ["get_master_weight", "get_optimizer_state", "set_master_weight", "set_optimizer_state"]

# DeepSpeed and `Engine` call them on every step; newer PyTorch has other names for them.
for _name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    warnings.filterwarnings("ignore", message=f".*{_name}.*", category=FutureWarning)

TESTED_VERSION = "0.19.8"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
BF16_OPTIMIZER = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
ZERO_OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
# SHA-256 of the source text, the first 16 digits; tests/training/test_deepspeed_internals.py prints new ones.
FINGERPRINTS = {
    # Which GPU a rank claims: `args.device_rank` (see `initialize`).
    f"{ENGINE}._set_distributed_vars": "29dafa57eca377c4",
    # Replaced by `replace_reduction`; and who calls the replaced functions.
    f"{ENGINE}.allreduce_gradients": "89aab0f80f1a80b3",
    f"{ENGINE}._take_model_step": "c4c6e01aa1fc4e7d",
    # Replaced by `apply_gradients`, whose buffers `_setup_for_real_optimizer` makes.
    f"{BF16_OPTIMIZER}.step": "9b21d4a28f8714d9",
    f"{BF16_OPTIMIZER}.zero_grad": "d071d3bc77f25419",
    f"{BF16_OPTIMIZER}.clear_hp_grads": "82cb16a0c5b97d8e",
    f"{BF16_OPTIMIZER}.update_lp_params": "128911db918ae80c",
    f"{BF16_OPTIMIZER}._setup_for_real_optimizer": "d5c428fde5756bc4",
    f"{BF16_OPTIMIZER}._lazy_init_hp_params_optimizer_state": "756e7b78c340beef",
    # Keeps `averaged_gradients`, and applies them without a norm.
    f"{ZERO_OPTIMIZER}.step": "9520884fd916d178",
    f"{ZERO_OPTIMIZER}._lazy_init_hp_params_optimizer_state": "45e666d78112a891",
    # Accepts our Muon, and asks for DeepSpeed's.
    # Whose views of the fp32 weights `master_part` takes.
    "deepspeed.utils.mixed_precision_linkage:link_hp_params": "6e5e840b03770f0b",
    "deepspeed.utils.tensor_fragment:get_full_hp_param": "49419e38f85f0c1b",
    "deepspeed.runtime.zero.utils:is_zero_supported_optimizer": "c21ccd4d14f9e3e2",
    "deepspeed.runtime.compiler:dummy_decorator": "d18838a6def6c1cd",
    # Asks `__compatible_ops__`, which is made on the first access.
    "deepspeed.comm.torch:build_shm_op": "2bf3cff9e3d1f058",
    "deepspeed.ops:__getattr__": "b6327fe22a4b2403",
}


@functools.cache
def prepare() -> None:
    """Check that DeepSpeed is what kraken-train was tested with, and switch off what costs seconds at each start.

    Raises ConfigError.
    """
    for name, expected in FINGERPRINTS.items():
        if fingerprint(name) != expected:
            raise untested(name.replace(":", "."))
    # The operators that this machine could compile, for which DeepSpeed would start compilers and ask the GPU on each
    # rank. None of them is used; one of them would be compiled for half a minute on a CPU.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    # Its bf16 optimizer collects garbage ten times to print its memory use.
    private("deepspeed.runtime.bf16_optimizer").see_memory_usage = lambda *_, **__: None
    # ZeRO imports the Muon optimizer, to ask whether it is in use, which loads TorchInductor to compile it.
    compiler = private("deepspeed.runtime.compiler")
    make_decorator, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    private("deepspeed.runtime.zero.muon.muon_optimizer")
    compiler.compile = make_decorator
    private("deepspeed.runtime.zero.utils:ZERO_SUPPORTED_OPTIMIZERS").append(Muon)


def private(name: str) -> Any:
    """A module, or what one has: "deepspeed.ops:__getattr__". Raises ConfigError where it does not exist."""
    module, _, attributes = name.partition(":")
    try:
        found = importlib.import_module(module)
        return functools.reduce(getattr, attributes.split(".") if attributes else [], found)
    except (ImportError, AttributeError) as error:
        raise untested(name.replace(":", ".")) from error


def fingerprint(name: str) -> str:
    try:
        source = inspect.getsource(inspect.unwrap(private(name)))
    except (OSError, TypeError) as error:  # it has no source, or is no function any more
        raise untested(name.replace(":", ".")) from error
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def untested(what: str) -> ConfigError:
    return ConfigError(
        f"DeepSpeed {deepspeed.__version__}: {what} is not that of DeepSpeed {TESTED_VERSION}, with which kraken-train "
        f"was tested; install deepspeed=={TESTED_VERSION}"
    )


def join_process_group(backend: str) -> None:
    """Make DeepSpeed use the process group that exists."""
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    mesh: ParallelMesh,
    device: torch.device,
) -> Any:
    """DeepSpeed's engine on this rank's `device`. Raises ConfigError where its buffers are not as tested."""
    prepare()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use unasked
        engine, *_ = deepspeed.initialize(
            args=device_arguments(device),
            model=model,
            optimizer=optimizer,
            config=settings,
            mpu=mesh,
            dist_init_required=False,
        )
    require_tested_layout(engine.optimizer, mesh.data_rank, mesh.data_size)
    return engine


def device_arguments(device: torch.device) -> argparse.Namespace:
    """The command line in which DeepSpeed finds the index of this rank's GPU.

    Without it, it takes LOCAL_RANK, which is no index where the launcher shows each rank its own GPU only.
    """
    return argparse.Namespace(device_rank=device.index or 0)


# ----------------------------------------------------------------------------------------------------------------
# The two optimizers: BF16_Optimizer of ZeRO-1 in bf16, with fp32 gradients of all parameters of a group in one tensor,
# and DeepSpeedZeroOptimizer of ZeRO-2 and of fp32, with a list of tensors for this rank's part of a group
# ----------------------------------------------------------------------------------------------------------------


def has_flat_gradients(zero: Any) -> bool:
    """Whether `zero` is a BF16_Optimizer."""
    return isinstance(zero, private(BF16_OPTIMIZER))


def require_tested_layout(zero: Any, copy: int, copies: int) -> None:
    """Raises ConfigError unless gradients are kept as tested: by group, the part of this copy a view of the whole."""
    kind, groups = type(zero).__name__, len(zero.optimizer.param_groups)
    if not has_flat_gradients(zero):
        if not isinstance(getattr(zero, "averaged_gradients", None), dict):
            raise untested(f"{kind}.averaged_gradients")
        return
    wholes = getattr(zero, "fp32_groups_gradients_flat", [])
    parts = getattr(zero, "fp32_groups_gradient_flat_partition", [])
    weights = getattr(zero, "fp32_groups_flat_partition", [])
    tested = len(wholes) == len(parts) == len(weights) == groups and all(
        part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        and (part.dtype, weight.dtype) == (torch.float32, torch.float32)
        and part.numel() * copies == whole.numel()
        and part.storage_offset() == whole.storage_offset() + copy * part.numel()
        and part.shape == weight.shape
        for whole, part, weight in zip(wholes, parts, weights, strict=True)
    )
    if not tested:
        raise untested(f"{kind}.fp32_groups_gradients_flat")


def flat_gradients(zero: Any) -> list[tuple[Tensor, Tensor]]:
    """Of a BF16_Optimizer, by group: the gradients of all parameters, and of them the part that this copy updates."""
    return list(zip(zero.fp32_groups_gradients_flat, zero.fp32_groups_gradient_flat_partition, strict=True))


def reduced_gradients(zero: Any) -> list[list[Tensor]]:
    """What this rank's optimizer updates with, by its groups, after reduction and before clipping."""
    if has_flat_gradients(zero):
        return [[partition] for partition in zero.fp32_groups_gradient_flat_partition]
    groups = [zero.averaged_gradients.get(index) for index in range(len(zero.param_groups))]
    return [[gradient for gradient in group or () if gradient is not None] for group in groups]


def replace_step(zero: Any) -> None:
    """Of a BF16_Optimizer: update with the gradients as they are."""
    zero.step = functools.partial(apply_gradients, zero)


def apply_gradients(zero: Any) -> None:
    """`BF16_Optimizer.step` without its norm, clipping and skipping, which read from the device."""
    partitions = zip(zero.fp32_groups_flat_partition, zero.fp32_groups_gradient_flat_partition, strict=True)
    for weights, gradients in partitions:
        weights.grad = gradients
    zero.optimizer.step()
    zero.update_lp_params()


def reduction_of(engine: Any) -> Callable[..., None]:
    """What `engine` calls after each backward pass to reduce the gradients over the copies."""
    return cast(Callable[..., None], engine.allreduce_gradients)


def replace_reduction(engine: Any, reduce: Callable[..., None]) -> None:
    engine.allreduce_gradients = reduce


def master_part(parameter: nn.Parameter) -> Tensor | None:
    """The part of a weight that this rank updates, flat, in fp32: a view of what it changes. None: it updates none."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    return None if mapping is None else cast(Tensor, mapping.hp_fragment)


def link_optimizer_state(zero: Any) -> None:
    """Let `get_optimizer_state` find the state that the optimizer has now."""
    zero._lazy_init_hp_params_optimizer_state()
