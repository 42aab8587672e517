"""Batches read ahead of the training loop by a background thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from kraken_train.data.dataset import Samples

BATCHES_AHEAD = 4


class BatchLoader:
    """Iterates over the inputs and targets, (micro_batch_size, context_length) int64 on `device`, of one rank.

    `ranges` are the samples of each batch. At most BATCHES_AHEAD batches are held, in pinned memory where the device
    is a GPU. An error of the thread is raised by `next` where its batch would have come. Leaving the context ends
    the thread.
    """

    def __init__(self, samples: Samples, ranges: Iterator[range], device: torch.device) -> None:
        self.samples = samples
        self.ranges = ranges
        self.device = device
        self._thread = ThreadPoolExecutor(1, "batches", initializer=self._choose_device)
        self._ahead: deque[Future[Tensor]] = deque()

    def __enter__(self) -> BatchLoader:
        for _ in range(BATCHES_AHEAD):
            self._read_ahead()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Waits for the batch, whose copy to the GPU continues in the background."""
        if not self._ahead:
            raise StopIteration
        tokens = self._ahead.popleft().result().to(self.device, non_blocking=True)
        self._read_ahead()
        return tokens[:, :-1], tokens[:, 1:]

    def _choose_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinning would otherwise open the first GPU in each process

    def _read_ahead(self) -> None:
        numbers = next(self.ranges, None)
        if numbers is not None:
            self._ahead.append(self._thread.submit(self._read, numbers))

    def _read(self, numbers: range) -> Tensor:
        tokens = torch.from_numpy(self.samples.batch(numbers))
        return tokens.pin_memory() if self.device.type == "cuda" else tokens


def ranges_of_rank(
    first: int, last: int, micro_batch_size: int, data_rank: int, data_parallel_size: int
) -> Iterator[range]:
    """The samples of each micro-batch of one model copy, among those from `first` to `last` (excluded) of a run."""
    begin = first + data_rank * micro_batch_size
    for start in range(begin, last, data_parallel_size * micro_batch_size):
        yield range(start, start + micro_batch_size)
