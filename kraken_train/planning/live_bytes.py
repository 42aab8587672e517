"""Bytes of the tensors that are alive, and their largest sum."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, counts what operations create until it is freed; real, fake and autograd's tensors alike.

    `torch.distributed._tools.mem_tracker.MemTracker` does the same and more, but has one peak for all of a run.
    """

    def __init__(self, excepted: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}
        self.excepted = {tensor.untyped_storage()._cdata for tensor in excepted}  # also when seen through a view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.excepted:
            return

        def free(_: Any) -> None:
            del self.known[key]
            self.current -= size

        self.known[key] = weakref.ref(storage, free)
        self.current += size
        self.peak = max(self.peak, self.current)

    def take_peak(self) -> int:
        """The largest sum since the last call."""
        peak, self.peak = self.peak, self.current
        return peak
