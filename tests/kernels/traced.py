"""Run by `test_kernels` in a process of its own, with kernels as a GPU has them: what `torch.compile` sees of them.

Triton takes the place of its driver, so that it analyses and compiles for an H100 without one. Tensors have no values.
Writes as JSON, for each kernel that a function and its gradient launch, which arguments it writes to, and with a second
argument `compile` the registers that its code for an H100 spills to memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import triton
from kernels.cases import Case, entry_cases, ffn_cases, head_cases
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from kraken_train.kernels.fused import FusedKernels

H100 = GPUTarget("cuda", 90, 32)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", int: "i32", float: "fp32"}


def launches(case: Case) -> list[dict[str, Any]]:
    """The arguments of each launch: names of tensors with their types, and values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(value).requires_grad_() for value in case.inputs if value is not None]

        def function(*values: torch.Tensor) -> list[torch.Tensor]:
            given = iter(values)
            arguments = [None if value is None else next(given) for value in case.inputs]
            results = getattr(FusedKernels, case.name)(*arguments, *case.settings)
            # Not views of an input, which this export does not take.
            return [result * 1 for result in (results if isinstance(results, tuple) else (results,))]

        graph = aot_export_joint_simple(function, tuple(inputs), trace_joint=True).graph
    found = []
    for node in graph.nodes:
        if "tensors_to_clone" in node.kwargs:
            values = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"]) | node.kwargs["kwargs"]
            tensors = {name: value.meta["val"] for name, value in values.items() if isinstance(value, torch.fx.Node)}
            found.append({
                "kernel": kernel_side_table.get_kernel(node.kwargs["kernel_idx"]),
                "writes": sorted(node.kwargs["tensors_to_clone"]),
                "tensors": {name: TYPES[tensor.dtype] for name, tensor in tensors.items()},
                "values": values,
            })  # fmt: skip
    return found


def spilled(launch: dict[str, Any]) -> int:
    kernel, values, warps = launch["kernel"], launch["values"], 4
    if isinstance(kernel, Autotuner):  # as PyTorch puts a number of warps
        kernel, warps = kernel.fn, kernel.configs[0].num_warps
    constants = {parameter.name: values[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else launch["tensors"].get(name) or TYPES[type(values[name])]
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=H100, options={"num_warps": warps})
    assert compiled.asm["cubin"]
    return len([line for line in compiled.asm["ptx"].splitlines() if ".local" in line])


if __name__ == "__main__":
    driver = MagicMock()
    driver.get_current_target.return_value = H100
    driver.get_current_device.return_value = 0
    triton.runtime.driver.set_active(driver)
    shape, dtype = (4, 1, 64, 504), torch.bfloat16
    cases = [*entry_cases(*shape, dtype, True)[:2], *ffn_cases(*shape, 1008, dtype)]
    cases += head_cases(4, 1, 64, (3, 3, 3), 168, dtype)[:2]
    found = []
    for case in cases:
        for launch in launches(case):
            name = launch["kernel"].fn.__name__
            local = spilled(launch) if "compile" in sys.argv[2:] else None
            found.append({"kernel": name, "writes": launch["writes"], "local": local})
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
