"""Who gets which multiprocessors while a sum is under way, and that nothing changes at any other time."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import launch_ranks

from kraken_train.parallel import mesh as mesh_module
from kraken_train.parallel import overlap_budget
from kraken_train.parallel.distributed import DistributedCommunicator, make_communicator
from kraken_train.parallel.mesh import DATA, KRAKEN, ParallelMesh
from kraken_train.parallel.overlap_budget import OverlapBudget, choose_budget, group_options
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.fake_trace import FakeGroup

H100, A100, CPU = (9, 0), (8, 0), None


@pytest.mark.parametrize(
    ("max_ctas", "sm_carveout", "capability", "ranks", "expected"),
    [
        (None, None, H100, 4, (16, 16)),
        (None, None, A100, 4, (0, 0)),
        (None, None, H100, 1, (0, 0)),  # no sums
        (8, None, H100, 4, (8, 16)),
        (0, 0, H100, 4, (0, 0)),
        (8, 12, A100, 2, (8, 12)),
        (8, 12, CPU, 2, (0, 0)),
    ],
)
def test_null_decides_by_the_device(
    monkeypatch: pytest.MonkeyPatch,
    max_ctas: int | None,
    sm_carveout: int | None,
    capability: tuple[int, int] | None,
    ranks: int,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    assert choose_budget(max_ctas, sm_carveout, device, ranks) == OverlapBudget(*expected)


@pytest.mark.parametrize("multiprocessors", [0, 16])
def test_gemms_beside_a_sum_leave_multiprocessors_free(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    """In both passes, from the launch of the sum to the wait for it; PyTorch's own setting tells."""
    libraries = ["cublas"]

    def prefer(library: str | None = None) -> str:
        libraries.append(library or libraries[-1])
        return libraries[-1]

    monkeypatch.setattr("torch.backends.cuda.preferred_blas_library", prefer)
    seen: dict[str, tuple[int | None, str]] = {}

    def note(name: str) -> None:
        seen[name] = (torch._C._get_sm_carveout_experimental(), libraries[-1])

    class Noted(torch.autograd.Function):
        """A computation of the model, with names for its two passes."""

        @staticmethod
        def forward(ctx: Any, values: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            note(f"{name}, forward")
            return values.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            note(f"{ctx.name}, backward")
            return gradient, None

    def collective(buffer: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(wait=lambda: note("wait"))

    group: Any = FakeGroup(ModelRank(0, 2))
    communicator = DistributedCommunicator(group, collective=collective, sm_carveout=multiprocessors)
    streams = torch.randn(2, 3, requires_grad=True)
    handle = communicator.start_all_reduce(Noted.apply(streams, "before"))
    attention = Noted.apply(streams, "attention")
    total = communicator.wait(handle)
    Noted.apply(total + attention.sum(0), "after").sum().backward()
    busy = (16, "cublaslt") if multiprocessors else (None, "cublas")
    idle = (None, "cublas")
    assert seen == {
        "before, forward": idle, "attention, forward": busy, "after, forward": idle, "wait": idle,
        "before, backward": idle, "attention, backward": busy, "after, backward": idle,
    }  # fmt: skip


def test_groups_of_copies_have_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other group; without one PyTorch makes all of them as before."""
    options = SimpleNamespace(config=SimpleNamespace(max_ctas=None), _timeout=None)
    nccl = SimpleNamespace(Options=lambda: options)
    monkeypatch.setattr(overlap_budget.dist, "ProcessGroupNCCL", nccl, raising=False)
    calls: list[tuple[str, Any]] = []

    def init_device_mesh(device_type: str, shape: object, mesh_dim_names: object, backend_override: Any) -> None:
        assert mesh_dim_names == (DATA, KRAKEN)
        calls.append((device_type, backend_override))

    monkeypatch.setattr(mesh_module, "init_device_mesh", init_device_mesh)
    ParallelMesh("cuda", 2, 4, OverlapBudget(max_ctas=8, sm_carveout=12))
    ParallelMesh("cuda", 2, 4, OverlapBudget(max_ctas=0, sm_carveout=12))
    assert calls == [("cuda", {KRAKEN: options}), ("cpu", None), ("cuda", None), ("cpu", None)]
    assert (options.config.max_ctas, options._timeout) == (8, timedelta(minutes=30))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    launch_ranks(1, str(__file__), device="cuda")


def check_on_a_gpu() -> None:
    """A group with the limit sums, and a GEMM that leaves multiprocessors free has the same result."""
    from kraken_train.parallel.ranks import read_runtime  # noqa: PLC0415
    from kraken_train.training.engine import start_processes, stop_processes  # noqa: PLC0415

    runtime = read_runtime()
    start_processes(runtime)
    budget = OverlapBudget(max_ctas=8, sm_carveout=16)
    assert group_options(budget).config.max_ctas == 8
    mesh = ParallelMesh("cuda", 1, 1, budget)
    group = mesh.get_model_parallel_group()
    assert group._get_backend(runtime.device).options.config.max_ctas == 8
    communicator = DistributedCommunicator(group, sm_carveout=budget.sm_carveout)
    left, right = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    expected, streams = left @ right, torch.ones(2, 3, device="cuda")
    library = torch.backends.cuda.preferred_blas_library()
    handle = communicator.start_all_reduce(streams)
    found = left @ right
    assert torch._C._get_sm_carveout_experimental() == 16
    total = communicator.wait(handle)
    assert torch._C._get_sm_carveout_experimental() is None
    assert torch.backends.cuda.preferred_blas_library() == library
    assert torch.equal(total, torch.full((3,), 2.0, device="cuda"))
    assert torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=1.0)
    assert make_communicator(mesh, None).model_rank.size == 1
    assert dist.get_world_size() == 1
    stop_processes(runtime)


if __name__ == "__main__":
    check_on_a_gpu()
