"""A sum over the ranks that is begun early and added late. Imports no vLLM."""

from __future__ import annotations

from torch import Tensor

from kraken_vllm.backend import Backend


class LateSum:
    """What is computed between `begin` and `add` hides the sum; without `overlap` the ranks wait in `begin`."""

    def __init__(self, backend: Backend, overlap: bool) -> None:
        self.is_alone = backend.share.size == 1
        self.overlap = overlap
        self.all_reduce, self.start_sum, self.add_sum = backend.all_reduce, backend.start_sum, backend.add_sum

    def begin(self, partial: Tensor) -> Tensor:
        """This rank's part -> what `add` takes, and nobody else may look at."""
        if self.is_alone:
            return partial
        return self.start_sum(partial) if self.overlap else self.all_reduce(partial)

    def add(self, partial: Tensor, begun: Tensor, own: Tensor) -> Tensor:
        """The argument and the result of `begin`, and a tensor -> that tensor plus the sum."""
        if self.overlap and not self.is_alone:
            return self.add_sum(partial, begun, own)
        return own + begun
