"""Seeing activations while a model computes, without changing what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kraken_train.model.layers import Layer

ROW = 512  # elements whose squares are summed in fp32


@contextmanager
def seen_outputs(
    model: nn.Module, label_of: Callable[[str, nn.Module], str | None], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """A context in which `see` gets the output of each module that has a label, and of a layer the residual stream.

    `label_of` gets the name of a module and the module. A hook within a compiled part would compile it anew: there,
    only layers may have labels.
    """

    def hook(label: str) -> Callable[..., None]:
        @torch.no_grad()
        def show(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(module, Layer):
                output = module.residual(output)
            elif isinstance(output, tuple):  # a sum, and the norm of the sum
                output = output[-1]
            see(label, output)

        return show

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            label = label_of(name, module)
            if label is not None:
                hooks.callback(module.register_forward_hook(hook(label)).remove)
        yield


@contextmanager
def shown_by_layers(layers: dict[str, Layer], see: Callable[[str, str, Tensor], None]) -> Iterator[None]:
    """A context in which `see` gets a layer's name here, and the name and value of all that the layer shows."""

    def observer(label: str) -> Callable[[str, Tensor], None]:
        return lambda name, value: see(label, name, value)

    try:
        for label, layer in layers.items():
            layer.observer = observer(label)
        yield
    finally:
        for layer in layers.values():
            layer.observer = None


def square_sum(values: Tensor) -> Tensor:
    """A scalar in float64, on the device of the values.

    Rows are summed in fp32, which is fast and takes no copy; over millions of elements, fp32 would be off by 1e-4.
    """
    flat = values.detach().reshape(-1)
    whole = len(flat) - len(flat) % ROW
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.promote_types(part.dtype, torch.float32)).double()
             for part in (flat[:whole].view(-1, ROW), flat[None, whole:])]  # fmt: skip
    return torch.cat(norms).square().sum()


def rms(values: Tensor) -> float:
    """Root mean square of the elements."""
    return math.sqrt(float(square_sum(values)) / values.numel())
