"""On ranks: a model and its teacher, both shared by the ranks of a copy, against plain PyTorch in one process."""

from __future__ import annotations

from typing import Any

import torch
from helpers import rough_model
from torch import Tensor
from torch.nn import functional as F

from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import sharded_dims
from parity.common import MODELS, make_mesh, make_model

PAIRS = [
    ("kraken-4", "standard"),
    ("kraken-4", "track"),
    ("standard", "kraken-4"),
    ("kraken-modern", "standard-modern"),
]
END = 3  # a token that ends a document
SHARE, TEMPERATURE, Z_WEIGHT = 0.6, 1.7, 0.02


def run(runtime: Runtime, sizes: list[int]) -> dict[str, Any]:
    return {
        f"{student} of {teacher}, {size} ranks, vocab_parallel={vocab_parallel}, apart={apart}": errors(
            runtime, student, teacher, size, vocab_parallel, apart
        )
        for size in sizes
        for student, teacher in PAIRS
        for vocab_parallel, apart in ((False, False), (True, True))
    }


def errors(
    runtime: Runtime, student_name: str, teacher_name: str, size: int, vocab_parallel: bool, apart: bool
) -> dict[str, float]:
    """Largest errors over all ranks, in float64: of the losses, and relative ones of the gradients."""
    mesh = make_mesh(runtime, size)
    wholes = [rough_model(MODELS[name], seed=seed) for seed, name in enumerate((student_name, teacher_name))]
    parts = [make_model(MODELS[name], mesh, vocab_parallel).double() for name in (student_name, teacher_name)]
    for whole, part in zip(wholes, parts, strict=True):
        whole.end_of_document = part.end_of_document = END if apart else None
        take_weights(part, whole)
    ids = torch.randint(MODELS[student_name].vocab_size, (2, 17), generator=torch.Generator().manual_seed(5))
    inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    targets[0, 3:7] = -100
    inputs[0, 6] = inputs[1, 1] = inputs[1, 12] = END

    student, teacher = parts
    found = student.losses(inputs, targets, Z_WEIGHT, teacher.soft_targets(inputs, SHARE, TEMPERATURE))
    found.objective.backward()
    cross_entropy, divergence, z_loss = plain_losses(*wholes, inputs, targets)
    objective = (1 - SHARE) * cross_entropy + SHARE * TEMPERATURE**2 * divergence + z_loss
    objective.backward()
    gradients = []
    for name, cut in sharded_dims(student).items():
        expected = wholes[0].get_parameter(name).grad
        assert expected is not None
        expected = expected if cut is None else cut.take(expected)
        gradient = student.get_parameter(name).grad
        assert gradient is not None
        gradients.append(float((gradient - expected).norm() / expected.norm()))
    of_this_rank = {
        "cross-entropy": abs(found.cross_entropy.item() - cross_entropy.item()),
        "divergence": abs(found.divergence.item() - divergence.item()),
        "objective": abs(found.objective.item() - objective.item()),
        "gradients": max(gradients),
        "gradients of the teacher": float(sum(parameter.grad is not None for parameter in teacher.parameters())),
    }
    return {key: max(rank[key] for rank in runtime.gather(of_this_rank)) for key in of_this_rank}


def take_weights(part: LanguageModel, whole: LanguageModel) -> None:
    for name, cut in sharded_dims(part).items():
        weight = whole.get_parameter(name).detach()
        part.get_parameter(name).data.copy_(weight if cut is None else cut.take(weight))


def plain_losses(
    student: LanguageModel, teacher: LanguageModel, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, KL and z-loss, by PyTorch's functions on all logits at once."""
    logits, counted = student(inputs), targets != -100
    with torch.no_grad():
        of_teacher = teacher(inputs)
    log_probabilities = [(part[counted] / TEMPERATURE).log_softmax(-1) for part in (logits, of_teacher)]
    divergence = F.kl_div(*log_probabilities, reduction="batchmean", log_target=True)
    z_loss = Z_WEIGHT * logits.logsumexp(-1)[counted].square().mean()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), divergence, z_loss
