"""The settings with which `kraken_train.training.engine` starts DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch

from kraken_train.config import TrainConfig
from kraken_train.training.precision import DTYPES


def deepspeed_settings(config: TrainConfig, data_parallel_size: int, bucket_elements: int) -> dict[str, Any]:
    bf16, stage = DTYPES[config.precision] == torch.bfloat16, config.engine.zero_stage
    accumulation_steps = config.gradient_accumulation_steps(data_parallel_size)
    return {
        "train_batch_size": max(config.batch_sizes),
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        # `Engine.update` computes the norm, clips, and skips non-finite steps.
        "gradient_clipping": 0.0,
        # Where micro-batches accumulate, gradients go to their fp32 sums as they come; bf16 ones would else be kept,
        # cleared and added to as well.
        "bf16": {"enabled": bf16, "check_grad_overflow": False, "immediate_grad_update": accumulation_steps > 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # by default bf16 gradients are summed over the ranks in bf16
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket_elements,
            "compute_grad_norm": bf16 and stage == 1,  # where it cannot be switched off; see `apply_gradients`
        },
        "timers": {"throughput": {"enabled": False}},  # by default it waits for the device twice per micro-batch
        "steps_per_print": None,
    }
