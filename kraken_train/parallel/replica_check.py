"""Checks that weights which several ranks hold are bit-equal: a checksum of each parameter, compared over all ranks.

A shared parameter (embeddings, final norm) is equal on all ranks, a part of a sub-layer parameter on the ranks of the
same number in all model copies, as long as every rank computes the same updates. A defect of a device, a driver or this
program shows here before it shows in the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kraken_train.common.errors import ReplicaError
from kraken_train.parallel.ranks import Runtime

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
MULTIPLIER = 0x9E3779B2  # even, so that the weights of a sum are odd and no difference of bits is lost to 2^64


def require_equal_replicas(tensors: Iterable[tuple[str, Tensor, bool]], model_size: int, runtime: Runtime) -> None:
    """Compare (name, tensor, whether it is shared by the ranks of a model copy) over all ranks. A collective.

    Raises ReplicaError, on all ranks, with the names and the ranks that differ. A wrong weight soon makes others
    wrong: only an early check names the first one.
    """
    if runtime.world_size == 1:
        return  # no other rank to compare with; the sums take as long as the copy of a state for a checkpoint
    named, sums = [], []
    for name, tensor, shared in tensors:
        named.append((name, shared))
        sums.append(checksum(tensor))
    tables = runtime.gather(torch.stack(sums).tolist())  # [rank][tensor][checksums]
    names: list[str] = []
    ranks: set[int] = set()
    for index, (name, shared) in enumerate(named):
        different = [
            rank
            for rank, table in enumerate(tables)
            if table[index] != tables[0 if shared else rank % model_size][index]
        ]
        if different:
            names.append(name)
            ranks.update(different)
    if names:
        raise ReplicaError(
            f"{listed(names)} {'is' if len(names) == 1 else 'are'} not the same on all ranks that hold it: rank "
            f"{listed(sorted(ranks))} has other bits than the first. A device or its memory may be faulty; the same "
            "command continues from the newest checkpoint"
        )


def listed(items: Sequence[object], most: int = 4) -> str:
    """ "a, b, c, d and 3 more"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def checksum(tensor: Tensor) -> Tensor:
    """Two int64 numbers that differ for any two tensors with different bits, except in constructed cases.

    Weighted sums of the bits of rows and of columns, modulo 2^64: cheap, without a copy of the tensor.
    """
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])
    bits = bits.view(-1, bits.shape[-1]) if bits.dim() else bits.view(1, 1)
    return torch.stack([weighted(bits.sum(dim=axis, dtype=torch.int64)) for axis in (0, 1)])


def weighted(sums: Tensor) -> Tensor:
    return (sums * (torch.arange(len(sums), device=sums.device) * MULTIPLIER + 1)).sum()
