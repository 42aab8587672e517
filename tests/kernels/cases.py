"""What the tests of the kernels compare, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kraken_train.kernels import twins

TOLERANCES = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-2}  # of the norm of an error over that of the value


class Case(NamedTuple):
    """A call of a function of `twins`."""

    name: str
    inputs: tuple[Tensor | None, ...]  # each has a gradient
    settings: tuple[Any, ...]


def entry_cases(
    n: int, batch: int, tokens: int, width: int, dtype: torch.dtype, center: bool, device: str = "cpu"
) -> list[Case]:
    x, added = random((2, n, batch, tokens, width), dtype, device)
    total, gain = random((batch, tokens, width), dtype, device), random((n, width), dtype, device)
    # The sum over the ranks may be wider than the rest.
    return [
        case
        for wide in {dtype, torch.promote_types(dtype, torch.float32)}
        for case in (
            Case("layer_entry", (x, added, gain), (1e-5, center, wide)),
            *(Case("ffn_entry", (x, added, total.to(wide), gain), (1e-5, center, reads)) for reads in (False, True)),
        )
    ]


def ffn_cases(
    n: int, batch: int, tokens: int, width: int, inner: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Case]:
    gate, up = random((2, n, batch, tokens, inner), dtype, device)
    weight = random((n, width, inner), dtype, device)
    return [Case("activated_product", (None, up, weight), ()), Case("activated_product", (gate, up, weight), ())]


def head_cases(
    n: int, batch: int, tokens: int, counts: tuple[int, int, int], size: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Case]:
    packed = random((n, batch, tokens, sum(counts), size), dtype, device)
    angles = random((batch, tokens, size // 2), torch.float64, device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return [
        Case("split_heads", (packed,), (counts,)),
        Case("split_heads", (packed,), (counts, cos, sin)),
        Case("split_heads", (packed,), (counts, cos[0], sin[0])),
    ]


def errors(case: Case, kernels: Any, compiled: bool = False) -> dict[str, float]:
    """The errors of the results and gradients of `kernels` against those of the twins in float64, relative in norm."""
    function = getattr(kernels, case.name)
    found = differentiate(torch.compile(function, fullgraph=True) if compiled else function, case)
    wide = Case(case.name, tuple(map(widen, case.inputs)), tuple(map(widen, case.settings)))
    expected = differentiate(getattr(twins, case.name), wide)
    for name, value in found.items():
        assert value.shape == expected[name].shape, (case.name, name)
    return {
        name: ((value.double() - expected[name]).norm() / expected[name].norm()).item() for name, value in found.items()
    }


def differentiate(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    inputs = [None if value is None else value.detach().clone().requires_grad_() for value in case.inputs]
    results = function(*inputs, *case.settings)
    results = results if isinstance(results, tuple) else (results,)
    weighted = [
        # Transposed, so that gradients arrive in other strides than those of the results.
        (result.transpose(-2, -3) * random(result.transpose(-2, -3).shape, result.dtype, result.device)).sum()
        for result in results
    ]
    torch.stack([part.double() for part in weighted]).sum().backward()
    found = {f"result {index}": result.detach() for index, result in enumerate(results)}
    return found | {f"gradient {index}": value.grad for index, value in enumerate(inputs) if value is not None}


def widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) else value


def random(shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """The same numbers for the same shape, rounded to bf16, so that all types can hold them."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)
