"""Two ranks of a model copy as two threads of one process, which is faster than starting processes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from helpers import random_ids
from torch import Tensor

from kraken_train.model.config import ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.sharding import ModelRank, sharded_dims
from kraken_train.planning.fake_trace import FakeGroup

Result = TypeVar("Result")


class ThreadSum:
    """An all-reduce among two threads, in place of `torch.distributed.all_reduce`."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.parts: list[Tensor | None] = [None, None]
        self.calls: Counter[int] = Counter()
        self.values: Counter[int] = Counter()  # of all calls together

    def of_rank(self, rank: int) -> Callable[..., Any]:
        def all_reduce(buffer: Tensor, op: Any = dist.ReduceOp.SUM, **_: Any) -> ThreadSum:
            self.calls[rank] += 1
            self.values[rank] += buffer.numel()
            self.parts[rank] = buffer.clone()
            self.barrier.wait()
            first, second = self.parts
            assert first is not None
            assert second is not None
            assert op == dist.ReduceOp.SUM
            buffer.copy_(first + second)
            self.barrier.wait()
            return self

        return all_reduce

    def wait(self) -> None:
        pass


def part_of(whole: LanguageModel, rank: int, total: ThreadSum, vocab_parallel: bool = False) -> LanguageModel:
    """What one of two ranks holds of the model, in fp64."""
    place = ModelRank(rank, 2)
    units, vocabulary = even_share(whole.config, place, vocab_parallel)
    communicator = DistributedCommunicator(FakeGroup(place), collective=total.of_rank(rank))  # type: ignore[arg-type]
    model = build_model(whole.config, 3, units, communicator, vocabulary).double()
    for name, dim in sharded_dims(model).items():
        weight = whole.get_parameter(name).detach()
        model.get_parameter(name).data.copy_(weight if dim is None else dim.take(weight))
    return model


def on_two_threads(work: Callable[[int], Result], barrier: threading.Barrier) -> list[Result]:
    """What `work` returns for ranks 0 and 1, each in a thread. Where one fails, its error is raised."""
    results: dict[int, Result] = {}
    failures = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[0], results[1]]


def compare_two_ranks(config: ModelConfig, recompute: bool = False) -> tuple[float, int]:
    """The largest relative difference of loss and gradients from the whole model, in fp64; all-reduces of a rank."""
    whole, ids = build_model(config, seed=3).double(), random_ids(config, 2, 20)
    make_gains_differ(whole)
    whole_loss = whole.loss(ids[:, :-1], ids[:, 1:])
    whole_loss.backward()
    total, errors = ThreadSum(), []

    def run(rank: int) -> None:
        model = part_of(whole, rank, total)
        model.recompute = recompute
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        errors.append(abs((loss - whole_loss).item()))
        for name, dim in sharded_dims(model).items():
            expected = whole.get_parameter(name).grad
            assert expected is not None
            expected = expected if dim is None else dim.take(expected)
            found = model.get_parameter(name).grad
            assert found is not None, name
            errors.append(((found - expected).norm() / expected.norm()).item())

    on_two_threads(run, total.barrier)
    assert total.calls[0] == total.calls[1]
    return max(errors), total.calls[0]


def make_gains_differ(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(0.2 * noise)
