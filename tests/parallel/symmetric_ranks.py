"""Started on several GPUs: sums over symmetric memory against exact ones, alone, overlapped and in CUDA graphs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_train.inference.ranks import connect, find_links, started_ranks
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.symmetric import SymmetricCommunicator, algorithm_for

SIZES = (32, 4096, 300 * 1024, 512 * 1024, 4 * 2**20, 40 * 2**20)  # bytes


def small_integers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Whose sums over eight ranks are exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (size // dtype.itemsize,), generator=generator).to("cuda", dtype)


def check_sums(communicator: Communicator, runtime: Runtime) -> list[str]:
    used, ranks = [], runtime.world_size
    for dtype in (torch.float32, torch.bfloat16):
        for number, size in enumerate(SIZES):
            parts = [small_integers(size, dtype, 100 * number + rank) for rank in range(ranks)]
            expected, own = torch.stack(parts).sum(dim=0), parts[runtime.rank]
            used.append(algorithm_for(own, communicator.exchange.links))  # type: ignore[attr-defined]
            assert communicator.all_reduce(own.clone()).equal(expected), (dtype, size)
            streams = own.view(1, 1, 1, -1)
            first = communicator.start_all_reduce(streams)
            busy = torch.randn(1024, 1024, device="cuda") @ torch.randn(1024, 1024, device="cuda")
            assert communicator.all_reduce(own.clone()).equal(expected), "while another is under way"
            assert communicator.wait(first).flatten().equal(expected), (dtype, size)
            assert busy.isfinite().all()
    return used


def check_equal_bits(communicator: Communicator, runtime: Runtime) -> None:
    for size in SIZES:
        torch.manual_seed(runtime.rank)
        total = communicator.all_reduce(torch.randn(size // 2, device="cuda", dtype=torch.bfloat16))
        everywhere = [torch.empty_like(total) for _ in range(runtime.world_size)]
        dist.all_gather(everywhere, total)
        assert all(other.equal(total) for other in everywhere), size


def check_graph(communicator: Communicator, runtime: Runtime) -> None:
    own = torch.full((1, 1, 4, 512), runtime.rank + 1.0, device="cuda", dtype=torch.bfloat16)

    def work() -> Tensor:
        pending = communicator.start_all_reduce(own)
        return communicator.wait(pending) + communicator.all_reduce(own[0].clone())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work()
    for _ in range(20):
        graph.replay()
    assert result.eq(runtime.world_size * (runtime.world_size + 1)).all()


@torch.inference_mode()
def check(runtime: Runtime) -> None:
    links = find_links(runtime)
    assert links is not None
    communicator = connect(runtime, "symmetric")
    assert isinstance(communicator, SymmetricCommunicator)
    used = check_sums(communicator, runtime)
    check_equal_bits(communicator, runtime)
    check_graph(communicator, runtime)
    part = torch.full((3, 2), float(runtime.rank), device="cuda")
    expected = torch.arange(runtime.world_size, device="cuda").repeat_interleave(2).expand(3, -1)
    assert communicator.gather(part).equal(expected.float())
    if runtime.is_first:
        print(links, used)


def main() -> None:
    with started_ranks("cuda") as runtime:
        check(runtime)


if __name__ == "__main__":
    main()
