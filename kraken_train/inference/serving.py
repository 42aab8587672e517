"""From an export to an engine on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from checkpoints.exports.folder import Export
from kraken_train.common.errors import ConfigError
from kraken_train.inference.engine import ExecutionConfig, InferenceEngine
from kraken_train.inference.loading import load_part, served_config, share_model
from kraken_train.inference.memory import free_memory, require_memory, serving_memory
from kraken_train.inference.ranks import AUTO, connect, on_all
from kraken_train.parallel.ranks import Runtime


def start_engine(
    export: Export,
    runtime: Runtime,
    speeds: Sequence[float],
    *,
    batch_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    dtype: torch.dtype,
    execution: ExecutionConfig,
    collectives: str = AUTO,
) -> InferenceEngine:
    """This rank's engine for prompts of up to `prompt_tokens` tokens and as many new ones, on all ranks of the run.

    `speeds` are those of the ranks' devices, `collectives` is one of `ranks.COLLECTIVES`. Raises ConfigError, before
    any weight is read, where the devices do not support `execution` or `collectives`, are too many to share the model,
    or have too little memory; CheckpointError on all ranks if the weights are damaged or one of the ranks cannot read
    its part.
    """
    execution.require_device(runtime.device)
    execution = execution.fitted(runtime.device, prompt_tokens, prompt_tokens + max_new_tokens)
    padded = execution.padded(prompt_tokens)
    capacity = max(prompt_tokens + max_new_tokens, padded)
    if capacity > export.config.context_length:
        raise ConfigError(
            f"prefill_lengths={list(execution.lengths)} pads a prompt of {prompt_tokens} tokens to {padded}, "
            f"and the model's context has {export.config.context_length}; use lengths up to that"
        )
    shares = share_model(export.config, speeds)
    needs = [
        serving_memory(served_config(export.config, units), units, batch_size, capacity, dtype, padded)
        for units in shares
    ]
    free = runtime.gather(free_memory(runtime.device, runtime.local_world_size))
    require_memory(needs, free, f"the model in {export.folder} with a batch of {batch_size} prompts")
    runtime.on_first(export.require_weights)
    units, communicator = shares[runtime.rank], connect(runtime, collectives)
    model = on_all(runtime, lambda: load_part(export, units, communicator, dtype, runtime.device))
    usable = tuple(length for length in execution.lengths if length <= capacity)
    return InferenceEngine(model, batch_size, capacity, replace(execution, prefill_lengths=usable))
