"""How a model is trained on a number of devices: the settings that a plan chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kraken_train.model.config import ModelConfig
from kraken_train.training.precision import DTYPES


@dataclass(frozen=True)
class TrainingLayout:
    """Settings of conf/train.yaml that decide memory, communication and time."""

    sub_layer_parallel_size: int  # devices of a model copy
    data_parallel_size: int  # copies
    micro_batch_size: int  # samples
    accumulation_steps: int
    zero_stage: int = 1
    activation_checkpointing: bool = False
    vocab_parallel: bool = False
    precision: str = "bf16"
    optim: str = "adamw"  # name of the optimizer
    teacher: ModelConfig | None = None  # of a distillation

    @property
    def devices(self) -> int:
        return self.sub_layer_parallel_size * self.data_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Samples of an optimizer step."""
        return self.micro_batch_size * self.accumulation_steps * self.data_parallel_size

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return self.dtype.itemsize

    @property
    def keeps_accumulator(self) -> bool:
        """Whether fp32 gradients stay in memory between steps: DeepSpeed's BF16_Optimizer, which is bf16 at stage 1."""
        return self.precision == "bf16" and self.zero_stage == 1

    @property
    def with_muon(self) -> bool:
        return self.optim == "muon"

    def vocabulary_rows(self, vocab_size: int) -> int:
        """Rows of the embedding and the head on a device; the last one may have fewer."""
        return -(-vocab_size // (self.sub_layer_parallel_size if self.vocab_parallel else 1))

    def teacher_of(self, model: ModelConfig) -> ModelConfig | None:
        """The teacher as it reads the samples of `model`, which may be shorter than it could."""
        return None if self.teacher is None else self.teacher.replace(context_length=model.context_length)

    @property
    def overrides(self) -> str:
        """The command-line settings of kraken_train.train."""
        values = {
            "parallel.sub_layer_parallel_size": self.sub_layer_parallel_size,
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.global_batch_size,
            "engine.zero_stage": self.zero_stage,
            "engine.activation_checkpointing": str(self.activation_checkpointing).lower(),
            "parallel.vocab_parallel": str(self.vocab_parallel).lower(),
            "precision": self.precision,
            "optim": self.optim,
        }
        return " ".join(f"{name}={value}" for name, value in values.items())
