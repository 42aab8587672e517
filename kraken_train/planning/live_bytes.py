"""The bytes of all tensors that are alive, and their peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, counts the tensors that operations create until they are freed: real ones, fake ones and those of
    autograd.

    `torch.distributed._tools.mem_tracker.MemTracker` does the same and more, but has a single peak for a whole run.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        cast(Any, super()).__init__()  # PyTorch gives it no types
        self.current = 0
        self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}
        self.excluded = {tensor.untyped_storage()._cdata for tensor in excluded}  # also when seen through a view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.excluded:
            return

        def free(_: Any) -> None:
            del self.known[key]
            self.current -= size

        self.known[key] = weakref.ref(storage, free)
        self.current += size
        self.peak = max(self.peak, self.current)

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.current
        return peak
