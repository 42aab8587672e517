"""Brings matrices whose elements lie on several ranks together on one of them, and the results back.

ZeRO cuts a group of weights, laid out as one vector, into an equal part for each model copy, wherever that falls; and
the ranks of a copy may each hold rows or columns of a matrix. A matrix goes whole to the copy that holds its first
element, and there to the least busy rank where the ranks of a copy hold parts of it. So each is on one rank, all ranks
have about as many elements to work on, and of matrices that a rank holds whole only those across a border move.

Ranks are numbered as in `kraken_train.parallel.mesh`: rank r is number r % P of copy r // P.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_train.parallel.matrices import MatrixPart
from kraken_train.parallel.mesh import Place


@dataclass(frozen=True)
class Piece:
    """Adjacent elements of a matrix in this rank's part of the vector."""

    matrix: int
    begin: int  # in this rank's part
    length: int


class MatrixExchange:
    """For the matrices `parts` of a vector of which each copy holds `elements` (the same on the ranks of a copy).

    `group` has all ranks; `all_to_all` is `torch.distributed.all_to_all_single` or stands in for it.
    """

    def __init__(
        self,
        parts: Sequence[MatrixPart],
        elements: int,
        place: Place,
        group: dist.ProcessGroup | None = None,
        all_to_all: Callable[..., Any] = dist.all_to_all_single,
    ) -> None:
        self.parts, self.place, self.group, self.all_to_all = parts, place, group, all_to_all
        owners = find_owners(parts, elements, place)
        self.owned = [number for number, owner in enumerate(owners) if owner == place.number]

        # What leaves this rank: its pieces, by owner.
        here = [piece for number, part in enumerate(parts) for piece in cut(part, number, place.copy, elements)]
        self.pieces = sorted(here, key=lambda piece: owners[piece.matrix])
        self.sent = [0] * place.world
        for piece in self.pieces:
            self.sent[owners[piece.matrix]] += piece.length

        # What arrives: of each rank, its part of each matrix that is owned here.
        self.arriving: list[tuple[int, int, int]] = []  # (matrix, rank of a copy, elements)
        self.lengths: dict[tuple[int, int], list[int]] = defaultdict(list)  # the same by (matrix, rank of a copy)
        self.received = [0] * place.world
        for copy in range(place.copies):
            for rank in range(place.ranks):
                for number in self.owned:
                    length = sum(piece.length for piece in cut(parts[number], number, copy, elements))
                    if length and rank in self.holders(number):
                        self.arriving.append((number, rank, length))
                        self.lengths[number, rank].append(length)
                        self.received[copy * place.ranks + rank] += length
        self.moves = place.world > 1 and any(
            (part.axis is not None and place.ranks > 1) or spans(part, elements) for part in parts
        )

    def holders(self, number: int) -> Sequence[int]:
        """The ranks of a copy whose parts make up a matrix."""
        return [self.place.rank] if self.parts[number].axis is None else range(self.place.ranks)

    def gather(self, vector: Tensor) -> list[Tensor]:
        """This rank's part of the vector -> the whole matrices of `owned`."""
        self.empty = vector.new_empty(0)
        leaving = [vector[piece.begin : piece.begin + piece.length] for piece in self.pieces]
        arrived = self.exchange(leaving, self.sent, self.received, [length for _, _, length in self.arriving])
        shards: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for (number, rank, _), elements in zip(self.arriving, arrived, strict=True):
            shards[number, rank].append(elements)
        return [self.assemble(number, shards) for number in self.owned]

    def assemble(self, number: int, shards: dict[tuple[int, int], list[Tensor]]) -> Tensor:
        """A matrix from the elements that each rank of a copy holds, in pieces by copy."""
        part = self.parts[number]
        whole = [joined(shards[number, rank]).view(part.rows, part.columns) for rank in self.holders(number)]
        return joined(whole, part.axis or 0)

    def scatter(self, matrices: Sequence[Tensor]) -> Sequence[Tensor]:
        """Matrices in the place of those that `gather` has given -> what each of `pieces` has of them."""
        shards: dict[tuple[int, int], Iterator[Tensor]] = {}
        for number, matrix in zip(self.owned, matrices, strict=True):
            ranks = self.holders(number)
            for rank, shard in zip(ranks, matrix.chunk(len(ranks), self.parts[number].axis or 0), strict=True):
                shards[number, rank] = iter(shard.reshape(-1).split(self.lengths[number, rank]))
        leaving = [next(shards[number, rank]) for number, rank, _ in self.arriving]
        return self.exchange(leaving, self.received, self.sent, [piece.length for piece in self.pieces])

    def exchange(
        self, leaving: Sequence[Tensor], sent: list[int], received: list[int], lengths: list[int]
    ) -> Sequence[Tensor]:
        """Send tensors, in the order of the ranks, and get what the others send, cut into `lengths`."""
        if not self.moves and [tensor.numel() for tensor in leaving] == lengths:
            return leaving
        buffer = torch.cat([*leaving, self.empty])
        if self.moves:
            arrived = buffer.new_empty(sum(received))
            self.all_to_all(arrived, buffer, received, sent, group=self.group)
            buffer = arrived
        pieces: Sequence[Tensor] = buffer.split(lengths)
        return pieces


def find_owners(parts: Sequence[MatrixPart], elements: int, place: Place) -> list[int]:
    """The number of the rank that gets each matrix; where the ranks of a copy hold parts of it, the least busy one."""
    loads: dict[int, list[int]] = defaultdict(lambda: [0] * place.ranks)  # by copy
    owners = []
    for part in parts:
        copy, rank = part.runs[0][0] // elements, place.rank
        if part.axis is not None:
            rank = loads[copy].index(min(loads[copy]))
            loads[copy][rank] += part.rows * part.columns
        owners.append(copy * place.ranks + rank)
    return owners


def joined(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=axis)


def cut(part: MatrixPart, number: int, copy: int, elements: int) -> list[Piece]:
    """The pieces of a matrix in the part of the vector that belongs to `copy`."""
    pieces = []
    for begin, length in part.runs:
        first, end = max(begin, copy * elements), min(begin + length, (copy + 1) * elements)
        if first < end:
            pieces.append(Piece(number, first - copy * elements, end - first))
    return pieces


def spans(part: MatrixPart, elements: int) -> bool:
    """Whether several copies hold elements of a matrix."""
    begin, (last, length) = part.runs[0][0], part.runs[-1]
    return begin // elements != (last + length - 1) // elements
