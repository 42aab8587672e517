"""How large weights, updates and activations are, layer by layer, in every `norms.every`-th optimizer step.

Sizes are root mean squares of the elements, a norm divided by the square root of the number of elements, and those of
the whole model over the global batch, whatever part of them this rank holds:

    rms/weight/PLACE      matrices, in fp32, after the update
    rms/update/PLACE      the change of these in the step, weight decay included
    rms/gain/PLACE        gains of norms after the update
    rms/activation/PLACE  the residual stream after a layer, or all streams x_i of a Kraken
    rms/attention/PLACE   of a Kraken a_i, each stream's own attention
    rms/sum/PLACE         of a Kraken s, the exchanged sum that is added to a_i; in the first layer the embedding

PLACE is layer_NUMBER, counted from 0 as in the names of weights, or a module beside the layers, as token_embedding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kraken_train.model.observation import seen_outputs, shown_by_layers, square_sum
from kraken_train.parallel.weight_role import WeightRole, weight_role
from kraken_train.run.metrics import rms_key
from kraken_train.training.engine import Engine
from kraken_train.training.metrics_logger import Record


class StepNorms:
    """Measures a step within `of_forward` and `of_update`. Nothing waits for the device before `take`."""

    def __init__(self, engine: Engine, every: int) -> None:
        self.engine = engine
        self.every = every
        self.gains = {
            f"{prefix}.{name}"
            for prefix, module in engine.model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if weight_role(module) is WeightRole.NORM
        }
        # Of the step under way, by metric, in the same order on all ranks:
        self.squares: dict[str, Tensor] = {}  # sums over what counts here
        self.elements: dict[str, int] = defaultdict(int)  # of the whole model

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    @contextmanager
    def of_forward(self, step: int) -> Iterator[None]:
        """The context of a step's forward passes."""
        if not self.is_due(step):
            yield
            return
        self.squares, self.elements = {}, defaultdict(int)
        layers = {f"layer_{number}": layer for number, layer in enumerate(self.engine.model.layers)}
        places: dict[nn.Module, str] = {layer: place for place, layer in layers.items()}
        with (
            seen_outputs(self.engine.model, lambda _, module: places.get(module), self.add_residual),
            shown_by_layers(layers, self.add_activation),
        ):
            yield

    def add_residual(self, place: str, stream: Tensor) -> None:
        self.add_activation(place, "activation", stream)

    def add_activation(self, place: str, kind: str, values: Tensor) -> None:
        """Values (B, T, D) that the ranks of a copy share, or (n, B, T, D) of the units here."""
        mesh, is_shared = self.engine.mesh, values.dim() == 3
        counts = mesh.model_rank.rank == 0 or not is_shared
        elements = values.numel() * mesh.data_size * (1 if is_shared else mesh.model_rank.size)
        self.add(rms_key(kind, place), values if counts else None, elements)

    @contextmanager
    def of_update(self, step: int) -> Iterator[None]:
        """The context of a step's update. It keeps a copy of the fp32 weights that this rank updates."""
        if not self.is_due(step):
            yield
            return
        parts = {name: part for name, part in self.counted_parts() if part is not None}
        before = {name: part.clone() for name, part in parts.items() if name not in self.gains}
        yield
        for name, part in self.counted_parts():
            place, sharded_dim = place_of(name), self.engine.sharded_dims[name]
            shape = self.engine.model.get_parameter(name).shape
            elements = (shape if sharded_dim is None else sharded_dim.whole_shape(shape)).numel()
            self.add(rms_key("gain" if name in self.gains else "weight", place), part, elements)
            if name not in self.gains:
                self.add(rms_key("update", place), None if part is None else before[name].sub_(part), elements)

    def counted_parts(self) -> Iterator[tuple[str, Tensor | None]]:
        """`Engine.master_parts`, but of what the ranks of a copy share only those of the first rank."""
        for name, part in self.engine.master_parts():
            is_shared = self.engine.sharded_dims[name] is None
            yield name, None if is_shared and self.engine.mesh.model_rank.rank > 0 else part

    def add(self, metric: str, values: Tensor | None, elements: int) -> None:
        """Count `values`, None where they count on another rank; on all ranks they have so many `elements`."""
        if metric not in self.squares:
            self.squares[metric] = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        self.elements[metric] += elements
        if values is not None:
            self.squares[metric] += square_sum(values)

    def take(self) -> Record:
        """The sizes of the latest step that was measured, by metric. A collective that waits for the device."""
        sums = torch.stack(list(self.squares.values()))
        if self.engine.runtime.world_size > 1:
            dist.all_reduce(sums, group=self.engine.runtime.group)
        return {
            metric: math.sqrt(squares / self.elements[metric])
            for metric, squares in zip(self.squares, sums.tolist(), strict=True)
        }


def place_of(parameter: str) -> str:
    """ "layers.3.ffn.up.weight" -> "layer_3", "token_embedding.weight" -> "token_embedding"."""
    first, second, *_ = parameter.split(".")
    return f"layer_{second}" if first == "layers" else first
