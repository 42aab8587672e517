"""Small checkpoints of random tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoints.training.manifest import POINTER
from checkpoints.training.retention import Retention
from checkpoints.training.store import SINGLE_PROCESS
from checkpoints.training.writer import save_checkpoint


def tensors(step: int) -> dict[str, torch.Tensor]:
    """The tensors of a step; the seed is the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(3, 4, 5, generator=generator),
        "model.b": torch.randn(7, generator=generator),
        "optimizer.exp_avg.a": torch.randn(3, 4, 5, generator=generator),
    }


def save(folder: Path, step: int, keep: int = 3) -> None:
    save_checkpoint(folder, step, tensors(step), {"updates": step}, Retention(keep), SINGLE_PROCESS)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def files(folder: Path) -> list[Path]:
    """All files of all checkpoints."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != POINTER)
