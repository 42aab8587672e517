"""On ranks: how long passes take when all-reduces are late, on a clock on which nothing else takes time.

Each part of a layer and each all-reduce takes what the planner predicts. The collectives are real ones, and what is
computed while one is under way is what the model computes then, so the time of a pass is that of its true order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from helpers import shareable_configs
from torch import Tensor

from kraken_train.model.architecture import ModelConfig
from kraken_train.parallel.ranks import Runtime
from kraken_train.planning.cluster import Cluster, load_cluster
from kraken_train.planning.interconnect import Interconnect
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.roofline import part_seconds, predict_time
from kraken_train.planning.serving_time import Load, predict_pass, serving_part_seconds, winner_bytes
from kraken_train.planning.traffic import within_copy
from parity.common import make_mesh, make_model

LATENCIES = (0.5, 1.5, 4.0)  # of an all-reduce, in units of the slowest part of a layer, forward
RANKS = 2
FREE = Interconnect("free", 0.0, None, "")


@dataclass(frozen=True)
class LinkedCluster(Cluster):
    """With any interconnect, not one of conf/interconnect."""

    link: Interconnect = FREE

    def interconnect(self, ranks: int, stride: int) -> Interconnect:
        return self.link


class Clock:
    """Of a rank: it goes on only by what takes time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def pass_seconds(self, seconds: float) -> None:
        self.seconds += seconds

    def pass_until(self, moment: float) -> None:
        self.seconds = max(self.seconds, moment)


class Late:
    """A collective that is complete at `due`."""

    def __init__(self, work: Any, clock: Clock, due: float) -> None:
        self.work, self.clock, self.due = work, clock, due

    def wait(self) -> None:
        self.work.wait()
        self.clock.pass_until(self.due)


def late_all_reduce(clock: Clock, link: Interconnect) -> Callable[..., Any]:
    def all_reduce(buffer: Tensor, async_op: bool = False, **options: Any) -> Late | None:
        due = clock.seconds + link.all_reduce_seconds(buffer.nbytes, RANKS)
        late = Late(dist.all_reduce(buffer, async_op=True, **options), clock, due)
        if async_op:
            return late
        late.wait()
        return None

    return all_reduce


def run(runtime: Runtime) -> dict[str, list[dict[str, Any]]]:
    """Seconds by the clock and as predicted, of models of each architecture, for each latency."""
    return {
        name: [compare(runtime, config, latency) for latency in LATENCIES]
        for name, config in shareable_configs().items()
        if config.parallel_units[1] % RANKS == 0
    }


def compare(runtime: Runtime, config: ModelConfig, latency: float) -> dict[str, Any]:
    profile = load_cluster("l40s_pcie")
    layout = TrainingLayout(RANKS, 1, 1, 1, precision="fp32")
    forward = part_seconds(config, layout, profile)
    slowest = max(seconds for seconds, _ in forward.values())
    # The bytes count as well: half of the time of an all-reduce of (B, T, D), little of that of the gains.
    size = config.context_length * config.hidden_size * layout.width
    link = Interconnect("late", 1e6 * latency * slowest / 2, size / (latency * slowest / 2) / 1e9, "")
    cluster = LinkedCluster(**vars(profile), link=link)
    return {
        "step": step(runtime, config, layout, cluster),
        "prompt": serve(runtime, config, Load(1, config.context_length), cluster),
    }


def step(runtime: Runtime, config: ModelConfig, layout: TrainingLayout, cluster: LinkedCluster) -> dict[str, float]:
    sums = [collective for collective in within_copy(config, layout) if collective.kind == "all-reduce"]
    predicted = predict_time(config, layout, cluster, sums)
    parts = part_seconds(config, layout, cluster)
    ids = torch.zeros(1, config.context_length, dtype=torch.long)
    took = {}
    for name, link in (("late", cluster.link), ("at once", FREE)):
        clock = Clock()
        model = make_model(config, make_mesh(runtime, RANKS), collective=late_all_reduce(clock, link))
        for layer in model.layers:
            for part, (forward, backward) in parts.items():
                take(layer.get_submodule(part), clock, forward, backward)
        model.loss(ids, ids).backward()
        took[name] = clock.seconds
    return {
        "computed": took["at once"],
        "exposed": took["late"] - took["at once"],
        "predicted computed": config.num_layers * sum(sum(both) for both in parts.values()),
        "predicted exposed": predicted.exchange,
        "predicted hidden": predicted.hidden,
    }


@torch.no_grad()
def serve(runtime: Runtime, config: ModelConfig, load: Load, cluster: LinkedCluster) -> dict[str, float]:
    """A forward pass without the choice of a token, which gathers the largest logits."""
    predicted = predict_pass(config, RANKS, load, cluster, "fp32")
    choice = cluster.link.all_gather_seconds(winner_bytes(load, RANKS), RANKS)
    parts = serving_part_seconds(config, RANKS, load, cluster, "fp32")
    clock = Clock()
    model = make_model(config, make_mesh(runtime, RANKS), collective=late_all_reduce(clock, cluster.link))
    for layer in model.layers:
        for part, seconds in parts.items():
            take(layer.get_submodule(part), clock, seconds, 0.0)
    model(torch.zeros(load.sequences, load.new_tokens, dtype=torch.long))
    return {
        "took": clock.seconds,
        "predicted": config.num_layers * sum(parts.values()) + predicted.exposed - choice,
        "predicted hidden": predicted.hidden,
    }


def take(module: torch.nn.Module, clock: Clock, forward: float, backward: float) -> None:
    module.register_forward_pre_hook(lambda *_: clock.pass_seconds(forward))
    module.register_full_backward_pre_hook(lambda *_: clock.pass_seconds(backward))
