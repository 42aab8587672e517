"""The teacher of a distillation: the model of an export, from whose predictions a run learns beside its text.

The teacher is no part of what is trained: DeepSpeed, the optimizer and checkpoints do not see it. A checkpoint has its
fingerprint, by which a run that continues recognises it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.exports.folder import WEIGHTS_FILE, Export, read_export
from checkpoints.exports.initial import require_same_tokenizer
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256
from kraken_train.common.settings import to_dict
from kraken_train.common.validation import divisors
from kraken_train.config import TrainConfig
from kraken_train.inference.loading import load_part
from kraken_train.kernels.selection import KERNELS_SETTING, choose_kernels
from kraken_train.model.config import ModelConfig
from kraken_train.model.divergence import SoftTargets
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import even_share
from kraken_train.parallel.communicator import Communicator
from kraken_train.settings.loss import DistillConfig
from kraken_train.training.precision import DTYPES


@dataclass(frozen=True)
class TeacherExport:
    """An export that can teach the model of a run."""

    export: Export

    @property
    def config(self) -> ModelConfig:
        return self.export.config

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the teacher's settings and weights. Reads all of the file. Raises CheckpointError."""
        self.export.require_weights()
        settings = json.dumps(to_dict(self.config), sort_keys=True)
        weights = file_sha256(self.export.folder / WEIGHTS_FILE)
        return hashlib.sha256(f"{settings}{weights}".encode()).hexdigest()[:32]

    @property
    def record(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"folder": str(self.export.folder), "fingerprint": self.fingerprint}


def open_teacher(config: TrainConfig, model: ModelConfig, tokenizer_files: Mapping[str, str]) -> TeacherExport | None:
    """The export `distill.teacher` of a run that trains `model` on data whose tokenizer has `tokenizer_files`.

    None: the run has no teacher. Raises CheckpointError where the export cannot teach the model.
    """
    if config.distill.teacher is None:
        return None
    folder = Path(config.distill.teacher)
    name = f"distill.teacher={folder}"
    export = read_teacher(name, folder, model)
    require_same_tokenizer(name, export, tokenizer_files)
    require_shareable(name, export.config, model, config.parallel.sub_layer_parallel_size)
    return TeacherExport(export)


def read_teacher(name: str, folder: Path, model: ModelConfig) -> Export:
    """The export in `folder`, which the setting `name` names. Raises CheckpointError where it does not fit `model`."""
    if not folder.is_dir():
        raise CheckpointError(f"{name} is not a folder; name an export that checkpoints.export has written")
    export = read_export(folder)
    teacher = export.config
    if teacher.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"{name} has model.vocab_size={teacher.vocab_size}, and this model {model.vocab_size}; train with "
            f"model.vocab_size={teacher.vocab_size}, the same rows of the same tokenizer"
        )
    if teacher.context_length < model.context_length:
        raise CheckpointError(
            f"{name} has model.context_length={teacher.context_length}, less than the {model.context_length} tokens of "
            f"this run's samples; use model.context_length={teacher.context_length} or less, or another teacher"
        )
    return export


def require_shareable(name: str, teacher: ModelConfig, model: ModelConfig, size: int) -> None:
    """Raises CheckpointError unless the `size` ranks of a model copy can share the teacher evenly too."""
    units, total = teacher.parallel_units
    if total % size:
        both = divisors(math.gcd(total, model.parallel_units[1]))
        raise CheckpointError(
            f"parallel.sub_layer_parallel_size={size} does not divide {units}={total} of the teacher {name}, which the "
            f"same ranks share; use {' or '.join(both)}, or another teacher"
        )


class Teacher:
    """This rank's part of the teacher: frozen, in evaluation mode, in the precision of the training."""

    def __init__(self, model: LanguageModel, config: DistillConfig) -> None:
        self.model = model
        self.share = config.weight
        self.temperature = config.temperature

    def predict(self, input_ids: Tensor) -> SoftTargets:
        """What it predicts for a micro-batch (B, T), as far as its last hidden state."""
        return self.model.soft_targets(input_ids, self.share, self.temperature)


def load_teacher(
    teacher: TeacherExport,
    config: TrainConfig,
    communicator: Communicator,
    end_of_document: int | None,
    device: torch.device,
) -> Teacher:
    """This rank's part, shared by the ranks of `communicator` as the model is, its vocabulary included.

    `end_of_document` as in the model: documents are apart for both or for neither. Raises CheckpointError.
    """
    shares_vocabulary = config.parallel.shares_vocabulary(teacher.config.vocab_size)
    units, vocabulary = even_share(teacher.config, communicator.model_rank, shares_vocabulary)
    model = load_part(teacher.export, units, communicator, DTYPES[config.precision], device, vocabulary)
    model.end_of_document = end_of_document
    if choose_kernels(config.engine.fused_kernels, device, KERNELS_SETTING):
        model.use_fused_kernels()
    if config.engine.compiles(device.type):
        model.compile_parts()
    return Teacher(model, config.distill)


def require_same_teacher(recorded: dict[str, Any] | None, teacher: TeacherExport | None, where: Path) -> None:
    """A run may begin or end to learn from a teacher when it continues, but not from another one.

    `recorded` is what the checkpoint `where` has of its teacher. Raises CheckpointError.
    """
    if recorded is None or teacher is None or recorded["fingerprint"] == teacher.fingerprint:
        return
    raise CheckpointError(
        f"{where} was trained with another teacher than distill.teacher={teacher.export.folder}: the export "
        f"{recorded['folder']} of fingerprint {recorded['fingerprint']}, not {teacher.fingerprint}; use that export, "
        "distill.teacher=null to go on without a teacher, or another run_dir"
    )
