from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from kraken_train.data.dataset import Samples, TokenStream
from kraken_train.data.loader import BATCHES_AHEAD, BatchLoader, ranges_of_rank

CPU = torch.device("cpu")


def make_samples(tokens: int = 500) -> Samples:
    return Samples([TokenStream([np.arange(tokens, dtype=np.uint16)])], 8, seed=3)


def load(samples: Samples, ranges: Iterable[range], device: torch.device = CPU) -> BatchLoader:
    return BatchLoader(((samples, numbers) for numbers in ranges), device)


def test_batches_are_the_samples_in_order() -> None:
    samples, ranges = make_samples(), [range(0, 4), range(8, 12), range(1000, 1003)]
    with load(make_samples(), ranges) as loader:
        batches = list(loader)
    assert len(batches) == 3
    for (inputs, targets), numbers in zip(batches, ranges, strict=True):
        windows = torch.from_numpy(samples.batch(numbers))
        assert inputs.dtype == torch.int64
        assert inputs.device == CPU
        assert torch.equal(inputs, windows[:, :-1])
        assert torch.equal(targets, windows[:, 1:])


def test_ranks_divide_the_samples() -> None:
    """Of 2 copies with micro-batches of 3, in global batches of 12, from sample 24 to 48."""
    ranks = [list(ranges_of_rank(24, 48, 3, rank, 2)) for rank in (0, 1)]
    assert ranks[0] == [range(24, 27), range(30, 33), range(36, 39), range(42, 45)]
    assert sorted(k for rank in ranks for numbers in rank for k in numbers) == list(range(24, 48))
    assert ranks[1] == list(ranges_of_rank(24, 36, 3, 1, 2)) + list(ranges_of_rank(36, 48, 3, 1, 2))  # resumed


def test_it_reads_ahead_but_not_far(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, read = make_samples(), []
    batch = samples.batch
    monkeypatch.setattr(samples, "batch", lambda numbers: (read.append(numbers), batch(numbers))[1])
    with load(samples, ranges_of_rank(0, 1000, 2, 0, 1)) as loader:
        for taken in range(5):
            loader._thread.submit(lambda: None).result()  # all that it was to read before is read
            assert len(read) == taken + BATCHES_AHEAD
            next(loader)


def test_an_error_is_raised_where_its_batch_would_come(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples()
    batch = samples.batch

    def fail_at_third(numbers: range) -> np.ndarray:
        if numbers.start == 4:
            raise OSError(5, "Input/output error")
        return batch(numbers)

    monkeypatch.setattr(samples, "batch", fail_at_third)
    with load(samples, ranges_of_rank(0, 20, 2, 0, 1)) as loader:
        next(loader)
        next(loader)
        with pytest.raises(OSError, match="Input/output error"):
            next(loader)


def test_it_goes_on_with_other_batches() -> None:
    """As after a rollback: what was read ahead does not come."""
    samples, others = make_samples(), make_samples(300)
    with load(samples, [range(0, 4), range(4, 8)]) as loader:
        next(loader)
        loader.go_on_with(iter([(others, range(6, 9)), (samples, range(0, 2))]))
        batches = [inputs for inputs, _ in loader]
    assert len(batches) == 2
    assert torch.equal(batches[0], torch.from_numpy(others.batch(range(6, 9)))[:, :-1])
    assert torch.equal(batches[1], torch.from_numpy(samples.batch(range(0, 2)))[:, :-1])


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_the_context(error: type[BaseException] | None) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]

    try:
        with load(make_samples(), ranges_of_rank(0, 10**9, 2, 0, 1)) as loader:
            next(loader)
            assert len(threads()) == 1
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert threads() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_reach_the_gpu() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with load(make_samples(), ranges_of_rank(0, 40, 4, 0, 1), device) as loader:
        assert loader._ahead[0].result().is_pinned()
        for first, (inputs, targets) in enumerate(loader):
            windows = torch.from_numpy(make_samples().batch(range(4 * first, 4 * first + 4)))
            assert inputs.device == device
            assert torch.equal(inputs.cpu(), windows[:, :-1])
            assert torch.equal(targets.cpu(), windows[:, 1:])
