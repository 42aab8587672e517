"""Memory, communication and time of training a model on a cluster, for a given layout."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.flops import forward_flops_per_token, training_flops_per_token
from kraken_train.planning.cluster import Cluster
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import Memory, predict_memory
from kraken_train.planning.roofline import StepTime, predict_time
from kraken_train.planning.teacher import teacher_seconds, teacher_traffic
from kraken_train.planning.traffic import Collective, predict_traffic
from kraken_train.settings.parallel import ParallelConfig


@dataclass(frozen=True)
class Prediction:
    layout: TrainingLayout
    memory: Memory  # of each device
    traffic: tuple[Collective, ...]
    time: StepTime
    tokens: int  # of an optimizer step, over all devices
    mfu: float
    usable_bytes: int  # of each device

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable_bytes

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.total

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, tokens per second."""
        return {
            "choices": {**asdict(self.layout), "global_batch_size": self.layout.global_batch_size},
            "memory": {**self.memory.parts, "total": self.memory.total, "moment": self.memory.moment},
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "traffic": [collective.as_dict() for collective in self.traffic],
            "seconds": {**self.time.parts, "total": self.time.total, "hidden exchange": self.time.hidden},
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "overrides": self.layout.overrides,
        }


def predict(config: ModelConfig, layout: TrainingLayout, cluster: Cluster) -> Prediction:
    """Memory is counted as the engine allocates it; time follows from the figures of the cluster.

    Raises ConfigError where the devices of a copy cannot share the model.
    """
    ParallelConfig(layout.sub_layer_parallel_size, layout.vocab_parallel, None, 0).require_fits(config)
    traffic = predict_traffic(config, layout)
    time = predict_time(config, layout, cluster, traffic)
    flops_per_token = training_flops_per_token(config)
    if (teacher := layout.teacher_of(config)) is not None:
        traffic += teacher_traffic(teacher, layout)
        time = replace(time, teacher=teacher_seconds(teacher, layout, cluster))
        flops_per_token += forward_flops_per_token(teacher)
    tokens = layout.global_batch_size * config.context_length
    peak = cluster.peak_flops(layout.precision) * layout.devices
    mfu = flops_per_token * tokens / time.total / peak
    memory = predict_memory(config, layout)
    return Prediction(layout, memory, tuple(traffic), time, tokens, mfu, cluster.usable_bytes)
