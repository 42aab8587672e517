"""The metrics of optimizer steps: loss, gradient norm, learning rate, throughput, utilization and data wait."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.model.documents import Documents
from kraken_train.model.flops import device_peak_flops, forward_flops_per_token, training_flops_per_token
from kraken_train.parallel.ranks import Runtime
from kraken_train.recipe.batch_ramp import Step
from kraken_train.training.engine import StepResult
from kraken_train.training.metrics_logger import Record


class StepMetrics:
    """Collects the learning rates and times of steps until their results are read.

    Throughput, utilization and data wait are means over the steps whose results are read together.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        runtime: Runtime,
        end_of_document: int | None,
        teacher: ModelConfig | None = None,
    ) -> None:
        self.model_config = model_config
        self.teacher = teacher
        self.end_of_document = end_of_document  # None: tokens attend to all before them
        self.tokens_per_sample = model_config.context_length
        self.has_ramp = len(config.batch_sizes) > 1
        self.z_weight = config.loss.z_loss
        device_peak = config.peak_tflops * 1e12 if config.peak_tflops else None
        if device_peak is None:
            device_peak = device_peak_flops(runtime.device, config.precision)
        self.peak_flops = device_peak * runtime.world_size if device_peak else None  # of all ranks; None: not known
        # Of the steps whose results have not been read:
        self.learning_rates: list[float] = []
        self.started = 0.0  # when the first of them began, by time.perf_counter
        self.data_seconds = 0.0  # waiting for batches
        self.attended: list[Tensor] = []  # by micro-batch here, where documents are apart

    def begin_step(self, lr: float) -> None:
        if not self.learning_rates:
            self.started, self.data_seconds = time.perf_counter(), 0.0
        self.learning_rates.append(lr)

    @contextmanager
    def wait_for_data(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        started = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - started

    def count_attention(self, input_ids: Tensor) -> None:
        """Of a micro-batch (B, T), without waiting for the device."""
        if self.end_of_document is not None:
            self.attended.append(Documents.of(input_ids, self.end_of_document).attended)

    def take(self, steps: Sequence[Step], results: Sequence[StepResult], samples: int) -> list[Record]:
        """One record for each of the `steps` and its result, which are all since the last call.

        `samples` were consumed before the first.
        """
        learning_rates, self.learning_rates = self.learning_rates, []
        seconds = time.perf_counter() - self.started
        tokens_per_second = sum(step.samples for step in steps) * self.tokens_per_sample / seconds
        attended, self.attended = float(torch.stack(self.attended).mean()) if self.attended else None, []
        flops_per_token = training_flops_per_token(self.model_config, attended)
        if self.teacher is not None:
            flops_per_token += forward_flops_per_token(self.teacher, attended)
        records = []
        for step, lr, result in zip(steps, learning_rates, results, strict=True):
            samples += step.samples
            record: Record = {
                "step": step.number,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "tokens": samples * self.tokens_per_sample,
                "tokens_per_second": tokens_per_second,
                "data_wait": self.data_seconds / seconds,
            }
            if self.has_ramp:
                record["global_batch_size"] = step.samples
            if self.z_weight:
                record["z_loss"] = result.z_loss
            if self.teacher is not None:
                record["distill_kl"] = result.divergence
            if self.peak_flops:
                record["mfu"] = flops_per_token * tokens_per_second / self.peak_flops
            records.append(record)
        return records
