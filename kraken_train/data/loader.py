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

    `reads` are the samples of each batch, by number. At most BATCHES_AHEAD batches are held, in pinned memory where
    the device is a GPU. An error of the thread is raised by `next` where its batch would have come. Leaving the context
    ends the thread.
    """

    def __init__(self, reads: Iterator[tuple[Samples, range]], device: torch.device) -> None:
        self.reads = reads
        self.device = device
        self._thread = ThreadPoolExecutor(1, "batches", initializer=self._choose_device)
        self._ahead: deque[Future[Tensor]] = deque()

    def __enter__(self) -> BatchLoader:
        self.go_on_with(self.reads)
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

    def go_on_with(self, reads: Iterator[tuple[Samples, range]]) -> None:
        """The next batch is the first of these; what was read ahead is dropped."""
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()
        self.reads = reads
        for _ in range(BATCHES_AHEAD):
            self._read_ahead()

    def _choose_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinning would otherwise open the first GPU in each process

    def _read_ahead(self) -> None:
        read = next(self.reads, None)
        if read is not None:
            self._ahead.append(self._thread.submit(self._read, *read))

    def _read(self, samples: Samples, numbers: range) -> Tensor:
        tokens = torch.from_numpy(samples.batch(numbers))
        return tokens.pin_memory() if self.device.type == "cuda" else tokens


def ranges_of_rank(
    first: int, last: int, micro_batch_size: int, data_rank: int, data_parallel_size: int
) -> Iterator[range]:
    """The samples of each micro-batch of one model copy, among those from `first` to `last` (excluded) of a run."""
    begin = first + data_rank * micro_batch_size
    for start in range(begin, last, data_parallel_size * micro_batch_size):
        yield range(start, start + micro_batch_size)
