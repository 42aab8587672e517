"""Continues batches of prompts token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.head import MostLikely
from kraken_train.inference.sampling import Sampling, draw
from kraken_train.model.config import ModelConfig

# By type of device, 1 on others. More wait less often, and compute more tokens after the last row's end in vain.
TOKENS_PER_READ = {"cuda": 16}
NOT_FINITE = -1  # in place of an id


def continue_prompts(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    first_row: int = 0,
    end_of_document: int | None = None,
    vocab_size: int | None = None,
    tokens_per_read: int | None = None,
) -> list[list[int]]:
    """Prompts of token ids, as many as the engine takes at a time at most, each with up to `max_new_tokens` more.

    A row ends with `end_of_document` where that is drawn. `vocab_size` is the tokenizer's, where the embedding has
    further rows as padding: those are never drawn. The tokens of a row depend on the seed and on the row's number, of
    which `first_row` is the first, but not on other rows. Every rank that has a part of the model calls
    this and gets the same result. Raises CheckpointError if the model computes no finite numbers.

    Tokens stay on the device, from which `tokens_per_read` of each row are read at a time (by default as many as
    `TOKENS_PER_READ` says): only then does the CPU wait, and notice that all rows have ended.
    """
    rows = [list(prompt) for prompt in prompts]
    generators = [sampling.generator(first_row + number) for number in range(len(rows))]
    tokens_per_read = tokens_per_read or TOKENS_PER_READ.get(engine.device.type, 1)
    finished = [False] * len(rows)
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    hidden = engine.read_prompts(padded, torch.tensor([len(row) for row in rows]))
    unread: list[Tensor] = []
    for remaining in reversed(range(max_new_tokens)):
        chosen = choose(engine, hidden, sampling, generators, vocab_size)
        unread.append(chosen.ids.masked_fill(~chosen.finite, NOT_FINITE))
        if len(unread) == tokens_per_read or remaining == 0:
            for next_ids in read(unread):
                if not all(finished):
                    append(next_ids, rows, finished, end_of_document)
            unread.clear()
        if remaining == 0 or all(finished):
            break
        hidden = engine.add_tokens(chosen.ids)
    return rows


def choose(
    engine: InferenceEngine,
    hidden: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    vocab_size: int | None,
) -> MostLikely:
    """The next token of each row, on the device and equal on all ranks."""
    if sampling.temperature == 0:
        return engine.most_likely(hidden, vocab_size)
    logits = engine.logits(hidden)
    drawn = draw(logits[:, :vocab_size], sampling, generators)
    # Unequal devices may round the probabilities of equal logits differently: all take the same rank's token.
    return MostLikely(engine.model.communicator.maximum(drawn), logits.isfinite().all(dim=-1))


def read(unread: Sequence[Tensor]) -> list[list[int]]:
    """Wait for the device; the ids of all rows, token by token."""
    ids: list[list[int]] = torch.stack(list(unread)).tolist()
    return ids


def append(next_ids: Sequence[int], rows: list[list[int]], finished: list[bool], end_of_document: int | None) -> None:
    if NOT_FINITE in next_ids:
        raise CheckpointError("the model's predictions are not finite: its weights are damaged or have diverged")
    for number, token in enumerate(next_ids):
        if not finished[number]:
            rows[number].append(token)
            finished[number] = token == end_of_document


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
