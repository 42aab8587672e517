"""Likelihoods of continuations against the softmax of each request alone, over two ranks and over two copies."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rough_model, small_configs
from thread_ranks import ThreadSum, on_two_threads, part_of

from kraken_train.evaluation.likelihoods import Likelihood, Request, likelihoods, shared_likelihoods
from kraken_train.model.config import ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.ranks import Runtime

VOCABULARY, CONTEXT = 97, 24
ALONE = Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)


@pytest.fixture(params=["kraken", "standard-modern"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return rough_model(small_configs(VOCABULARY, CONTEXT)[request.param])


def make_requests(model: LanguageModel) -> list[Request]:
    """Of many lengths, some longer than the context; every third continues as the model would."""
    random = np.random.default_rng(1)
    requests = []
    for index in range(17):
        context = random.integers(0, VOCABULARY, 1 + (index * 5) % 31).tolist()
        continuation = random.integers(0, VOCABULARY, 1 + index % 5).tolist()
        if index % 3 == 0:
            continuation = [most_likely(model, context)]
        requests.append(Request(context, continuation))
    context = [5, 7, 11]
    greedy = most_likely(model, context)
    half_greedy = Request(context, [greedy, (most_likely(model, [*context, greedy]) + 1) % VOCABULARY])
    return [*requests, half_greedy, Request([3], random.integers(0, VOCABULARY, CONTEXT).tolist())]


@torch.no_grad()
def most_likely(model: LanguageModel, context: list[int]) -> int:
    return int(model(torch.tensor([context[-CONTEXT:]]))[0, -1].argmax())


@torch.no_grad()
def alone(model: LanguageModel, request: Request) -> Likelihood:
    tokens = (request.context + request.continuation)[-(CONTEXT + 1) :]
    logits = model(torch.tensor([tokens[:-1]]))[0, -len(request.continuation) :]
    chosen = [float(row.log_softmax(-1)[token]) for row, token in zip(logits, request.continuation, strict=True)]
    return Likelihood(sum(chosen), logits.argmax(-1).tolist() == request.continuation)


def require_equal(found: list[Likelihood], expected: list[Likelihood]) -> None:
    assert [likelihood.greedy for likelihood in found] == [likelihood.greedy for likelihood in expected]
    np.testing.assert_allclose([x.logarithm for x in found], [x.logarithm for x in expected], rtol=1e-12)


@pytest.mark.parametrize("tokens_at_once", [None, 3])
def test_a_batch(model: LanguageModel, tokens_at_once: int | None) -> None:
    if tokens_at_once is not None:
        model.head.cross_entropy.logits_at_once = tokens_at_once * VOCABULARY
    requests = make_requests(model)
    expected = [alone(model, request) for request in requests]
    assert any(answer.greedy for answer in expected)
    assert not all(answer.greedy for answer in expected)
    require_equal(likelihoods(model, requests), expected)
    seen: list[None] = []
    require_equal(shared_likelihoods(model, requests, 4, (0, 1), ALONE, lambda: seen.append(None)), expected)
    assert len(seen) == -(-len(requests) // 4)
    assert shared_likelihoods(model, [], 4, (0, 1), ALONE, lambda: None) == []


class Gathering:
    """A Runtime of two threads, as far as its `gather` goes."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.values: list[Any] = [None, None]

    def of_rank(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            return list(self.values)

        return type("ThreadRuntime", (), {"gather": staticmethod(gather)})


def test_two_copies_share_the_batches(model: LanguageModel) -> None:
    requests, gathering = make_requests(model), Gathering()
    batches: list[int] = []

    def work(copy: int) -> list[Likelihood]:
        return shared_likelihoods(model, requests, 4, (copy, 2), gathering.of_rank(copy), lambda: batches.append(copy))

    first, second = on_two_threads(work, gathering.barrier)
    require_equal(first, [alone(model, request) for request in requests])
    assert first == second
    assert sorted(batches) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "config",
    [
        small_configs(VOCABULARY, CONTEXT)["kraken"].replace(num_sub_layers=4),
        small_configs(VOCABULARY, CONTEXT)["standard"].replace(hidden_size=32, num_heads=4),
    ],
)
def test_two_ranks_of_a_copy(config: ModelConfig) -> None:
    """Each has half of the layers' units and an uneven part of the vocabulary."""
    whole = rough_model(config)
    requests, total, gathering = make_requests(whole), ThreadSum(), Gathering()

    def work(rank: int) -> list[Likelihood]:
        part = part_of(whole, rank, total, vocab_parallel=True)
        return shared_likelihoods(part, requests, 4, (0, 1), gathering.of_rank(rank), lambda: None)

    first, second = on_two_threads(work, total.barrier)
    require_equal(first, [alone(whole, request) for request in requests])
    assert first == second
