"""The ranks of a run as a grid: data-parallel copies of the model x the ranks that share one copy.

Ranks of one copy are adjacent, so that their communication stays within a node: with P ranks a copy, rank r belongs to
copy r // P and is number r % P in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from kraken_train.parallel.overlap_budget import NO_BUDGET, OverlapBudget, group_options
from kraken_train.parallel.sharding import ModelRank, ShardedDim

DATA, KRAKEN = "data", "kraken"


@dataclass(frozen=True)
class Place:
    """A rank in the grid of a run."""

    copy: int = 0
    copies: int = 1
    rank: int = 0  # in its copy
    ranks: int = 1  # of a copy

    @property
    def world(self) -> int:
        return self.copies * self.ranks

    @property
    def number(self) -> int:
        return self.copy * self.ranks + self.rank


class ParallelMesh:
    """The grid of a run with an initialized process group; also the `mpu` (model parallel unit) of DeepSpeed."""

    def __init__(
        self,
        device_type: str,
        data_parallel_size: int,
        sub_layer_parallel_size: int,
        budget: OverlapBudget = NO_BUDGET,
    ) -> None:
        self.budget = budget  # of the sums over the ranks of a copy
        self.mesh = make_mesh(device_type, data_parallel_size, sub_layer_parallel_size, group_options(budget))
        # DeepSpeed asks for them several times a step, and DeviceMesh would create a submesh for each answer.
        self.sizes = {DATA: data_parallel_size, KRAKEN: sub_layer_parallel_size}
        # Tensors of a checkpoint are on the CPU, and DTensors must be where their mesh is.
        self.cpu_mesh = (
            self.mesh if device_type == "cpu" else make_mesh("cpu", data_parallel_size, sub_layer_parallel_size)
        )

    @property
    def model_rank(self) -> ModelRank:
        return ModelRank(self.get_model_parallel_rank(), self.get_model_parallel_world_size())

    @property
    def data_rank(self) -> int:
        return self.get_data_parallel_rank()

    @property
    def data_size(self) -> int:
        return self.get_data_parallel_world_size()

    @property
    def place(self) -> Place:
        return Place(self.data_rank, self.data_size, self.model_rank.rank, self.model_rank.size)

    @cached_property
    def copy_on_cpu(self) -> DeviceMesh:
        """The ranks of this copy. Kept, since DeviceMesh makes a new submesh for each answer."""
        return self.cpu_mesh[KRAKEN]

    def as_global(self, local: Tensor, sharded_dim: ShardedDim | None) -> Tensor:
        """This rank's part of a parameter, on the CPU, as a DTensor with the whole shape; a shared one unchanged.

        It shares the memory of `local`.
        """
        if sharded_dim is None:
            return local
        # The shape is given because the parts of the ranks may differ in size.
        shape = sharded_dim.whole_shape(local.shape)
        stride = torch.empty(shape, device="meta").stride()
        placement = [Shard(sharded_dim.axis)]
        return DTensor.from_local(local, self.copy_on_cpu, placement, run_check=False, shape=shape, stride=stride)

    def get_model_parallel_rank(self) -> int:
        return self.mesh.get_local_rank(KRAKEN)

    def get_model_parallel_world_size(self) -> int:
        return self.sizes[KRAKEN]

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(KRAKEN)

    def get_data_parallel_rank(self) -> int:
        return self.mesh.get_local_rank(DATA)

    def get_data_parallel_world_size(self) -> int:
        return self.sizes[DATA]

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(DATA)


def make_mesh(
    device_type: str, data_parallel_size: int, sub_layer_parallel_size: int, options: Any = None
) -> DeviceMesh:
    """`options` are those of the groups of a copy's ranks, for their backend."""
    shape = (data_parallel_size, sub_layer_parallel_size)
    override: dict[int | str, Any] | None = None if options is None else {KRAKEN: options}
    return init_device_mesh(device_type, shape, mesh_dim_names=(DATA, KRAKEN), backend_override=override)
