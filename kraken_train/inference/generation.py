"""Continues batches of prompts token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.sampling import Sampling, draw
from kraken_train.model.config import ModelConfig


def continue_prompts(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    first_row: int = 0,
    end_of_document: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Prompts of token ids, as many as the engine takes at a time at most, each with up to `max_new_tokens` more.

    A row ends with `end_of_document` where that is drawn. `vocab_size` is the tokenizer's, where the embedding has
    further rows as padding: those are never drawn. The tokens of a row depend on the seed and on the row's number, of
    which `first_row` is the first, but not on other rows. Every rank that has a part of the model calls
    this and gets the same result. Raises CheckpointError if the model computes no finite numbers.
    """
    rows = [list(prompt) for prompt in prompts]
    generators = [sampling.generator(first_row + number) for number in range(len(rows))]
    finished = [False] * len(rows)
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    logits = engine.prefill(padded, torch.tensor([len(row) for row in rows]))
    for remaining in reversed(range(max_new_tokens)):
        if not logits.isfinite().all():
            raise CheckpointError("the model's predictions are not finite: its weights are damaged or have diverged")
        next_ids = draw(logits[:, :vocab_size], sampling, generators)
        for number, token in enumerate(next_ids.tolist()):
            if not finished[number]:
                rows[number].append(token)
                finished[number] = token == end_of_document
        if remaining == 0 or all(finished):
            break
        logits = engine.decode(next_ids)
    return rows


def require_servable(prompt: Sequence[int], max_new_tokens: int, config: ModelConfig, name: str = "prompt") -> None:
    """Raises ConfigError unless the model can read the prompt, named `name` in messages, and add `max_new_tokens`."""
    tokens, context_length = len(prompt), config.context_length
    possible = context_length - tokens
    if tokens == 0:
        raise ConfigError(
            f"{name} has no tokens, and a model continues at least one; give a text, or prompt='' to begin a document"
        )
    if not all(0 <= token < config.vocab_size for token in prompt):
        wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
        raise ConfigError(
            f"{name} has the token {wrong}, and the model's vocabulary has the tokens 0 to {config.vocab_size - 1}; "
            "encode it with the model's own tokenizer"
        )
    if possible < 1:
        raise ConfigError(
            f"{name} has {tokens} tokens, which leaves no room in the model's context of {context_length}; use at "
            f"most {context_length - 1}"
        )
    if max_new_tokens > possible:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} after the {tokens} tokens of {name} exceeds the model's context of "
            f"{context_length}; use at most {possible}"
        )
