"""How likely a model finds continuations of texts, with the work shared by its copies.

Shapes: B requests of a batch, T tokens, D hidden size, V vocabulary size, S tokens of continuations in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from kraken_train.model.cross_entropy import IGNORED
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.softmax import at_least_fp32
from kraken_train.parallel.ranks import Runtime


class Request(NamedTuple):
    """`continuation` has at most `context_length` tokens; where both have more, the beginning of `context` is cut."""

    context: list[int]  # at least one token
    continuation: list[int]


class Likelihood(NamedTuple):
    logarithm: float  # of the continuation's probability, in nats
    greedy: bool  # whether each of its tokens is the most likely one


def shared_likelihoods(
    model: LanguageModel,
    requests: Sequence[Request],
    batch_size: int,
    share: tuple[int, int],
    runtime: Runtime,
    progress: Callable[[], None],
) -> list[Likelihood]:
    """Those of all requests, in their order, on every rank. A collective of all ranks of `runtime`.

    `share` is (number of this copy of the model, how many there are). `progress` is called after each batch.
    """
    # Longest first: less padding, and an out-of-memory error comes early.
    order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index])))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    copy, copies = share
    own: dict[int, Likelihood] = {}
    for batch in batches[copy::copies]:
        own |= zip(batch, likelihoods(model, [requests[index] for index in batch]), strict=True)
        progress()
    found = {index: likelihood for answers in runtime.gather(own) for index, likelihood in answers.items()}
    return [found[index] for index in range(len(requests))]


@torch.no_grad()
def likelihoods(model: LanguageModel, requests: Sequence[Request]) -> list[Likelihood]:
    """Those of a batch, in one forward pass; logits exist for tokens of continuations only, some at a time."""
    sequences = [(context + continuation)[-(model.context_length + 1) :] for context, continuation in requests]
    length = max(map(len, sequences)) - 1
    ids = np.zeros((len(requests), length), np.int64)
    targets = np.full((len(requests), length), IGNORED)
    for row, row_targets, tokens, request in zip(ids, targets, sequences, requests, strict=True):
        last = len(tokens) - 1
        row[:last] = tokens[:-1]  # the padding after them does not matter, because attention is causal
        row_targets[last - len(request.continuation) : last] = request.continuation
    device = model.token_embedding.weight.device
    wanted = torch.from_numpy(targets).to(device)
    hidden = model.last_hidden(torch.from_numpy(ids).to(device))  # (B, T, D)
    scored = wanted != IGNORED
    logarithms: list[float] = []
    greedy: list[bool] = []
    tokens_at_once = model.head.cross_entropy.chunk_tokens
    for part, tokens in zip(hidden[scored].split(tokens_at_once), wanted[scored].split(tokens_at_once), strict=True):
        logits = model.head.logits(part)  # (S, V)
        logits = logits.to(at_least_fp32(logits.dtype))
        logarithms += logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].double().tolist()
        greedy += (logits.argmax(-1) == tokens).tolist()
    answers, first = [], 0
    for request in requests:
        last = first + len(request.continuation)
        answers.append(Likelihood(sum(logarithms[first:last]), all(greedy[first:last])))
        first = last
    return answers
