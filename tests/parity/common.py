"""What the checks on several ranks share: small models, their samples, and engines on any grid of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from helpers import shareable_configs
from plain_muon import PlainMuon

from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.model.initialization import scale_initial_weights, weight_kind
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.distributed import DistributedCommunicator, make_communicator
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.recipe.optimizers import AdamWConfig, MuonConfig
from kraken_train.recipe.parametrization import STANDARD, Parametrization, parametrization_of
from kraken_train.recipe.schedules import ConstantSchedule
from kraken_train.settings.checkpoint import CheckpointConfig
from kraken_train.settings.engine import EngineConfig
from kraken_train.settings.health import HealthConfig
from kraken_train.settings.loss import LossConfig
from kraken_train.settings.parallel import ParallelConfig
from kraken_train.settings.tracking import TrackingConfig
from kraken_train.settings.validation import ValidationConfig
from kraken_train.training.engine import Engine
from kraken_train.training.precision import reduce_dtype

MODELS = shareable_configs()
# Of whose 131 rows two ranks have 66 and 65, four 33, 33, 33 and 32.
MODELS["uneven-vocabulary"] = replace(MODELS["kraken-4"], vocab_size=131)
GLOBAL_BATCH = 24
ACCUMULATION_STEPS = 2  # whatever the grid
MAX_GRAD_NORM = 0.5
RATE = 2e-3
END_OF_DOCUMENT = 66  # in some samples of a batch, at any place
MUP = {"parametrization": "mup", "base_hidden_size": 24, "base_num_layers": 1, "base_num_sub_layers": 2}  # of a Kraken
Z_LOSS = 0.03  # far above what one would use, so that it changes the training

Steps = list[list[float | bool]]  # [loss, gradient norm, applied] per step


def batch(config: ModelConfig, step: int, samples: int = GLOBAL_BATCH) -> torch.Tensor:
    """The samples of a step, (samples, context + 1) token ids: counting from somewhere in steps of 1 to 3."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(config.vocab_size, (samples, 1), generator=generator)
    stride = torch.randint(1, 4, (samples, 1), generator=generator)
    return (start + stride * torch.arange(config.context_length + 1)) % config.vocab_size


def settings(
    precision: str = "fp32",
    zero_stage: int = 1,
    sub_layer_parallel_size: int = 1,
    data_parallel_size: int = 1,
    vocab_parallel: bool | None = False,
    reduce_dtype: str | None = None,
    activation_checkpointing: bool = False,
    compile_parts: bool = False,
    z_loss: float = 0.0,
    muon: bool = False,
    attention_within_documents: bool = False,
    mup: bool = False,
    ema_decay: float | None = None,
) -> TrainConfig:
    optim: dict[str, Any] = {
        "lr": RATE, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": MAX_GRAD_NORM,
    }  # fmt: skip
    return TrainConfig(
        model={},
        data_dir="",
        run_dir="",
        init_from=None,
        max_steps=100,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH // (ACCUMULATION_STEPS * data_parallel_size),
        seed=0,
        precision=precision,
        attention_within_documents=attention_within_documents,
        resume="auto",
        max_nonfinite_steps=3,
        log_every=1,
        peak_tflops=None,
        rendezvous_seconds=600,
        watchdog_seconds=0,
        optim=MuonConfig(**optim, momentum=0.95, ns_steps=5) if muon else AdamWConfig(**optim, **(MUP if mup else {})),
        schedule=ConstantSchedule(warmup_steps=0),
        parallel=ParallelConfig(sub_layer_parallel_size, vocab_parallel, reduce_dtype, verify_every=0),
        engine=EngineConfig(zero_stage, activation_checkpointing, compile_parts),
        loss=LossConfig(z_loss),
        checkpoint=CheckpointConfig(every=1, keep=1, asynchronous=False),
        validation=ValidationConfig(every=0, samples=1),
        tracking=TrackingConfig("wandb", "off", "", None, None, None, tags=(), notes=None, finish_seconds=0),
        ema_decay=ema_decay,
        health=HealthConfig(0, 0, "stop", "ignore", spike_factor=10, spike_window=64, spike_steps=3, max_rollbacks=3),
    )


def make_mesh(runtime: Runtime, size: int) -> ParallelMesh:
    """One mesh per degree and process: process groups are few and never given back."""
    if size not in MESHES:
        MESHES[size] = ParallelMesh(runtime.device.type, runtime.world_size // size, size)
    return MESHES[size]


MESHES: dict[int, ParallelMesh] = {}


def make_model(
    config: ModelConfig,
    mesh: ParallelMesh,
    vocab_parallel: bool = False,
    dtype: torch.dtype | None = None,
    collective: Callable[..., Any] | None = None,
) -> LanguageModel:
    """This rank's part, connected by the distributed exchange even where a copy has one rank only."""
    communicator = DistributedCommunicator(mesh.get_model_parallel_group(), dtype, collective)
    units, vocabulary = even_share(config, mesh.model_rank, vocab_parallel)
    return build_model(config, 0, units, communicator, vocabulary)


def make_engine(config: ModelConfig, runtime: Runtime, size: int, **layout: Any) -> Engine:
    """An engine with `size` ranks per model copy; `choices` are those of `settings`."""
    train = settings(sub_layer_parallel_size=size, data_parallel_size=runtime.world_size // size, **layout)
    mesh = make_mesh(runtime, size)
    communicator = make_communicator(mesh, reduce_dtype(train.parallel))
    units, vocabulary = even_share(config, mesh.model_rank, train.parallel.shares_vocabulary(config.vocab_size))
    model = build_model(config, 0, units, communicator, vocabulary)
    model.end_of_document = END_OF_DOCUMENT if train.attention_within_documents else None
    parametrization = parametrization_of(train.optim, config)
    scale_initial_weights(model, lambda kind: parametrization.multipliers(kind).initial)
    engine = Engine(model, train, mesh, runtime, parametrization=parametrization)
    assert engine.accumulation_steps == ACCUMULATION_STEPS
    assert model.recompute == train.engine.activation_checkpointing
    assert is_compiled(model) == train.engine.compile
    return engine


def is_compiled(model: LanguageModel) -> bool:
    return all(part._compiled_call_impl is not None for layer in model.layers for part in layer.children())


def run_steps(
    engine: Engine,
    config: ModelConfig,
    steps: range,
    poisoned: int | None = None,
    sizes: Sequence[int] = (),
) -> Steps:
    """Train on the samples of `steps`. In step `poisoned` the last rank alone sees a NaN in a gradient.

    `sizes` are the samples of each step from 0 on, where they are not GLOBAL_BATCH.
    """
    for step in steps:
        if sizes:
            engine.set_batch_size(sizes[step])
        for micro_step, mine in enumerate(share_of_rank(engine, config, step)):
            hook = None
            if step == poisoned and micro_step == 0 and engine.runtime.rank == engine.runtime.world_size - 1:
                hook = engine.model.final_norm.weight.register_hook(lambda gradient: gradient * math.nan)
            engine.accumulate(mine[:, :-1], mine[:, 1:])
            if hook is not None:
                hook.remove()
        engine.step(RATE)
    return [[result.loss, result.grad_norm, result.applied] for result in engine.results()]


def share_of_rank(engine: Engine, config: ModelConfig, step: int) -> list[torch.Tensor]:
    """The samples of a step that this rank trains on, by micro-batch."""
    copies, micro_batches = engine.mesh.data_size, engine.accumulation_steps * engine.mesh.data_size
    samples = GLOBAL_BATCH * engine.accumulation_steps // ACCUMULATION_STEPS
    shares = batch(config, step, samples).to(engine.device).chunk(micro_batches)
    return list(shares[engine.mesh.data_rank :: copies])


def plain_training(
    config: ModelConfig,
    steps: range,
    z_loss: float = 0.0,
    muon: bool = False,
    end_of_document: int | None = None,
    sizes: Sequence[int] = (),
    parametrization: Parametrization = STANDARD,
) -> list[tuple[float, float]]:
    """(loss, gradient norm) per step of the same training in plain PyTorch: one process, the global batch at once."""
    model = build_model(config)
    model.end_of_document = end_of_document
    scale_initial_weights(model, lambda kind: parametrization.multipliers(kind).initial)
    optimizer: PlainMuon | torch.optim.Optimizer
    if muon:
        optimizer = PlainMuon(model, config, RATE)
    else:
        groups = []  # one for each parameter
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                kind = weight_kind(name, module)
                assert kind is not None
                by, decay = parametrization.multipliers(kind), 0.1 * ("norm" not in name)
                groups.append({"params": [parameter], "lr": RATE * by.learning_rate, "eps": 1e-8 * by.epsilon,
                               "weight_decay": decay / by.learning_rate})  # fmt: skip
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    results = []
    for step in steps:
        samples = batch(config, step, sizes[step] if sizes else GLOBAL_BATCH)
        loss = model.loss(samples[:, :-1], samples[:, 1:])
        (loss + z_loss * model(samples[:, :-1]).logsumexp(-1).square().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    assert max(norm for _, norm in results) > MAX_GRAD_NORM, "the clipping is not tested"
    return results


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """The state that the ranks share, put together on each of them."""
    cuts = {name: part.axis for name, part in engine.sharded_dims.items() if part is not None}
    mine = engine.state()
    local = {key: tensor.to_local() if hasattr(tensor, "to_local") else tensor for key, tensor in mine.items()}
    shares: list[dict[str, torch.Tensor]] = [{}] * engine.runtime.world_size
    dist.all_gather_object(shares, local)
    whole = {}
    for name, _ in engine.model.named_parameters():
        for key in (f"model.{name}", *(f"optimizer.{kept}.{name}" for kept in engine.states[name])):
            parts = [share[key] for share in shares if key in share]
            assert len(parts) == (engine.mesh.model_rank.size if name in cuts else 1), key
            whole[key] = torch.cat(parts, dim=cuts[name]) if name in cuts else parts[0]
    more_than_one = sum((1 + len(engine.states[name])) * (engine.mesh.model_rank.size - 1) for name in cuts)
    assert len(whole) == sum(len(share) for share in shares) - more_than_one
    return whole


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
