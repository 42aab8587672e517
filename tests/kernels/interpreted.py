"""Run by `test_kernels` in a process whose Triton is interpreted: writes what it finds as JSON to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import random_ids, rough_model, small_configs
from kernels.cases import entry_cases, errors, ffn_cases, head_cases
from torch import Tensor

from kraken_train.bench.kernels import compare_kernels
from kraken_train.inference.engine import ExecutionConfig, InferenceEngine
from kraken_train.kernels import activation
from kraken_train.kernels.fused import FusedKernels
from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.distributed import DistributedCommunicator

SMALL = small_configs(context_length=8)
CONFIGS = {
    "gelu": SMALL["kraken-gqa"],
    "swiglu": SMALL["kraken-modern"],
    "rope": SMALL["kraken-modern"].replace(qk_norm=False),  # with which the kernel rotates
}


def kernels() -> list[dict[str, Any]]:
    activation.BLOCK = 256  # several blocks, the last one in part
    found = []
    for dtype, center in ((torch.float64, True), (torch.float32, False), (torch.bfloat16, True)):
        cases = [
            *entry_cases(3, 1, 9, 20, dtype, center),
            *ffn_cases(3, 1, 9, 20, 28, dtype),
            *head_cases(2, 2, 2, (3, 2, 2), 6, dtype),
        ]
        for case in cases:
            found.append({"case": case.name, "dtype": str(dtype)[6:], "errors": errors(case, FusedKernels)})
    return found


def models() -> dict[str, float]:
    """The largest relative error in norm of the loss and of each gradient, over whole models in float64."""
    plain = {name: gradients(name) for name in CONFIGS}
    cases: list[tuple[str, str, tuple[Callable[[LanguageModel], None], ...]]] = [
        ("gelu", "gelu", ()),
        ("rope", "rope", ()),
        ("computed again", "rope", (recompute,)),
        ("exchanged", "swiglu", (exchange,)),
        ("compiled", "swiglu", (compile_parts,)),
    ]
    return {case: distance(gradients(name, use_kernels, *also), plain[name]) for case, name, also in cases}


def gradients(name: str, *changes: Callable[[LanguageModel], None]) -> dict[str, Tensor]:
    config = CONFIGS[name]
    model = rough_model(config)
    for change in changes:
        change(model)
    ids = random_ids(config, 1, 5)
    loss = model.loss(ids, ids)
    loss.backward()
    return {"loss": loss.detach(), **{key: value.grad for key, value in model.named_parameters()}}


def use_kernels(model: LanguageModel) -> None:
    model.use_fused_kernels()


def recompute(model: LanguageModel) -> None:
    model.recompute = True


def exchange(model: LanguageModel) -> None:
    """Over a group of one rank, with all that several ranks do."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model.communicator = DistributedCommunicator(dist.group.WORLD)
    for layer in model.layers:
        layer.communicator = model.communicator


def compile_parts(model: LanguageModel) -> None:
    for layer in model.layers:
        for part in layer.children():
            part.compile(backend="aot_eager", fullgraph=True)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected)


def inference() -> float:
    """The relative error of the logits of a prompt and of a further token."""
    config = CONFIGS["rope"]
    ids = random_ids(config, 1, 4)
    logits = []
    for fused_kernels in (False, True):
        engine = InferenceEngine(rough_model(config), 1, 8, ExecutionConfig(fused_kernels=fused_kernels))
        logits.append(torch.cat([engine.prefill(ids[:, :3], torch.tensor([3])), engine.decode(ids[:, 3])]))
    return ((logits[1] - logits[0]).norm() / logits[0].norm()).item()


def benchmark() -> list[dict[str, Any]]:
    config = KrakenConfig(2, 1, hidden_size=8, heads_per_sub_layer=2, vocab_size=32, context_length=2)
    return [one.as_dict() for one in compare_kernels(config, 1, torch.device("cpu"))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = {"kernels": kernels(), "models": models(), "inference": inference(), "benchmark": benchmark()}
    Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
