"""On ranks: the distributed exchange itself, its order of events, what it hides, and what the checksums find."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from golden import Golden
from torch import Tensor

from kraken_train.common.errors import TrainingError
from kraken_train.model.config import KrakenConfig
from kraken_train.model.cross_entropy import IGNORED
from kraken_train.model.registry import build_model
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import sharded_dims
from parity.common import MODELS, make_engine, make_mesh, make_model, run_steps

OVERLAP_LAYERS = 40
END = 3  # a token that ends a document
Z_WEIGHT = 0.3
DELAY = 0.010  # seconds that every all-reduce takes longer


def run(runtime: Runtime, sizes: list[int]) -> dict[str, Any]:
    return {
        str(size): {
            "golden": golden(runtime, size),
            "architectures": {
                f"{name}, vocab_parallel={vocab_parallel}, apart={apart}": against_whole(
                    runtime, name, size, vocab_parallel, apart
                )
                for name in shared_by(size)
                for vocab_parallel, apart in ((False, False), (True, False), (True, True))
            },
            "leaks": {name: leak(runtime, name, size) for name in shared_by(size)},
            "events": {
                f"recompute={recompute}, apart={apart}": events(runtime, size, recompute, apart)
                for recompute in (False, True)
                for apart in (False, True)
            },
            "collectives": collectives(runtime, size),
            "replicas": replicas(runtime, size),
            "dtypes": reduction_dtypes(runtime, size),
            "groups": groups(runtime, size),
            "unequal sums": unequal_sums(runtime, size),
        }
        for size in sizes
    }


def shared_by(size: int) -> list[str]:
    """The models that so many ranks can share."""
    return [name for name, config in MODELS.items() if config.parallel_units[1] % size == 0]


def golden(runtime: Runtime, size: int) -> dict[str, float]:
    """Largest errors against the authors' float64 numbers, over all ranks."""
    expected = Golden()
    mesh = make_mesh(runtime, size)
    model = make_model(expected.config, mesh).double()
    cuts = sharded_dims(model)

    def part(name: str, whole: Tensor) -> Tensor:
        cut = cuts[name]
        return whole if cut is None else cut.take(whole)

    model.load_state_dict({name: part(name, weight) for name, weight in expected.weights.items()})
    logits = model(expected.input_ids).detach()
    loss = model.loss(expected.input_ids, expected.targets)
    loss.backward()
    gradients = [
        float((model.get_parameter(name).grad - part(name, gradient)).norm() / part(name, gradient).norm())
        for name, gradient in expected.gradients.items()
    ]
    errors = {
        "logits": float((logits - expected.logits).abs().max()),
        "loss": abs(loss.item() - expected.loss),
        "gradients": max(gradients),
    }
    return {name: max(rank[name] for rank in runtime.gather(errors)) for name in errors}


@dataclass(frozen=True)
class Expected:
    """What a whole model in one process computes in float64: inputs and results."""

    inputs: Tensor
    targets: Tensor
    losses: Tensor
    logits: Tensor
    z_loss: float
    gradients: dict[str, Tensor]


@functools.cache
def of_whole(name: str, apart: bool) -> Expected:
    """`apart`: with attention within documents. Some targets are ignored."""
    config = MODELS[name]
    whole = build_model(config).double()
    ids = torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(5))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 3:7] = IGNORED
    if apart:
        inputs[0, 6] = inputs[1, 1] = inputs[1, 12] = END
        whole.end_of_document = END
    losses, logits = whole.token_losses(inputs, targets).detach(), whole(inputs)
    z_loss = Z_WEIGHT * logits.logsumexp(-1)[targets != IGNORED].square().mean()
    (whole.loss(inputs, targets) + z_loss).backward()
    gradients = {key: parameter.grad for key, parameter in whole.named_parameters() if parameter.grad is not None}
    return Expected(inputs, targets, losses, logits.detach(), z_loss.item(), gradients)


def against_whole(runtime: Runtime, name: str, size: int, vocab_parallel: bool, apart: bool) -> dict[str, float]:
    """Largest relative errors of a model that ranks share against the same model in one process."""
    expected = of_whole(name, apart)
    model = make_model(MODELS[name], make_mesh(runtime, size), vocab_parallel).double()
    model.end_of_document = END if apart else None
    cuts = sharded_dims(model)
    losses = model.token_losses(expected.inputs, expected.targets).detach()
    found = model.losses(expected.inputs, expected.targets, z_weight=Z_WEIGHT)
    found.objective.backward()
    gradient_errors = []
    for key, parameter in model.named_parameters():
        cut, gradient = cuts[key], expected.gradients[key]
        gradient = gradient if cut is None else cut.take(gradient)
        gradient_errors.append(float((parameter.grad - gradient).norm() / gradient.norm()))
    errors = {
        "logits": float((model(expected.inputs).detach() - expected.logits).abs().max()),
        "losses": float((losses - expected.losses).abs().max()),
        "z_loss": abs(float(found.z_loss) - expected.z_loss),
        "gradients": max(gradient_errors),
    }
    return {key: max(rank[key] for rank in runtime.gather(errors)) for key in errors}


def leak(runtime: Runtime, name: str, size: int) -> dict[str, bool]:
    """Whether other tokens of a document change a bit of what the next one gives: logits, loss and all gradients."""
    model = make_model(MODELS[name], make_mesh(runtime, size), vocab_parallel=True)

    def of_second(ids: Tensor) -> list[Tensor]:
        targets = ids.roll(-1, dims=1).index_fill(1, torch.arange(7), IGNORED)
        targets[:, -1] = END
        model.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        return [model(ids)[:, 7:].detach(), loss.detach(), *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]

    ids = torch.randint(END + 1, MODELS[name].vocab_size, (2, 16), generator=torch.Generator().manual_seed(6))
    ids[:, 7] = END
    changed = ids.clone()
    changed[:, :7] = ids[:, :7].flip(1)
    found = {}
    for apart in (False, True):
        model.end_of_document = END if apart else None
        pairs = zip(of_second(ids), of_second(changed), strict=True)
        found[f"apart={apart}"] = not all(torch.equal(one, other) for one, other in pairs)
    return {key: any(rank[key] for rank in runtime.gather(found)) for key in found}


class RecordedWork:
    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def events(runtime: Runtime, size: int, recompute: bool, apart: bool = False) -> list[str]:
    """What happens in one forward and backward pass, as rank 0 sees it."""
    log: list[str] = []

    def all_reduce(buffer: Tensor, **options: Any) -> RecordedWork:
        assert options["async_op"]
        log.append("start")
        return RecordedWork(dist.all_reduce(buffer, **options), log)

    config = MODELS["kraken-4"]
    model = make_model(config, make_mesh(runtime, size), collective=all_reduce).to(runtime.device)
    model.recompute = recompute
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda *_: log.append("attention"))
        layer.attention.register_full_backward_pre_hook(lambda *_: log.append("attention backward"))
        layer.attention.register_full_backward_hook(lambda *_: log.append("attention done"))
        layer.ffn.register_forward_pre_hook(lambda *_: log.append("ffn"))
        layer.ffn.register_full_backward_pre_hook(lambda *_: log.append("ffn backward"))
    ids = torch.zeros(1, 8, dtype=torch.long, device=runtime.device)
    model.end_of_document = 0 if apart else None
    loss = model.loss(ids, ids)
    log.append("loss")
    loss.backward()
    return log


def collectives(runtime: Runtime, size: int) -> dict[str, int]:
    """All-reduces of one forward and backward pass by architecture, with and without recomputation."""
    counted = {}
    for name in shared_by(size):
        for recompute in (False, True):
            count = 0

            def all_reduce(buffer: Tensor, **options: Any) -> Any:
                nonlocal count
                count += 1
                return dist.all_reduce(buffer, **options)

            model = make_model(MODELS[name], make_mesh(runtime, size), collective=all_reduce)
            model.recompute = recompute
            ids = torch.zeros(1, 8, dtype=torch.long)
            loss = model.loss(ids, ids)
            counted[f"{name} forward recompute={recompute}"] = count
            loss.backward()
            counted[f"{name} both recompute={recompute}"] = count
    return counted


def replicas(runtime: Runtime, size: int) -> dict[str, str]:
    """What the checksums say of a flipped bit on the last rank, by the parameter that it is in."""
    found = {}
    engine = make_engine(MODELS["kraken-4"], runtime, size, precision="bf16")
    for name in ("token_embedding.weight", "final_norm.weight", "layers.1.ffn.up.weight"):
        bits = engine.model.get_parameter(name).data.view(torch.int16).view(-1)
        for flip in (True, False):
            if runtime.rank == runtime.world_size - 1:
                bits[-1] ^= 1
            try:
                engine.verify_replicas()
                message = ""
            except TrainingError as error:
                message = str(error)
            messages = runtime.gather(message)
            found[f"{name} {'flipped' if flip else 'restored'}"] = message if len(set(messages)) == 1 else str(messages)
    return found


def unequal_sums(runtime: Runtime, size: int) -> str:
    """What the checksums say after steps in which the last rank had other last bits in a shared gradient."""
    engine = make_engine(MODELS["kraken-4"], runtime, size)
    if runtime.rank == runtime.world_size - 1:
        engine.model.final_norm.weight.register_hook(lambda gradient: gradient * (1 + 1e-6))
    run_steps(engine, MODELS["kraken-4"], range(2))
    try:
        engine.verify_replicas()
    except TrainingError as error:
        return str(error)
    return ""


def reduction_dtypes(runtime: Runtime, size: int) -> list[str]:
    """The types of the buffers that are summed: model's type, setting."""
    seen = []
    for model_dtype, dtype in (
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        buffers = set()

        def all_reduce(buffer: Tensor, buffers: set[torch.dtype] = buffers, **options: Any) -> Any:
            buffers.add(buffer.dtype)
            return dist.all_reduce(buffer, **options)

        model = make_model(MODELS["kraken-4"], make_mesh(runtime, size), False, dtype, all_reduce).to(model_dtype)
        ids = torch.zeros(1, 8, dtype=torch.long)
        model.loss(ids, ids).backward()
        seen.append(f"{model_dtype} {dtype} -> {' '.join(map(str, buffers))}")
    return seen


def groups(runtime: Runtime, size: int) -> list[list[list[int]]]:
    """The global ranks of each rank's copy, and of those on its place in the other copies."""
    mesh = make_mesh(runtime, size)
    mine = [mesh.get_model_parallel_group(), mesh.get_data_parallel_group()]
    return runtime.gather([dist.get_process_group_ranks(group) for group in mine])


class Clock:
    """Of a rank: it goes on only by what takes time, or with the machine where `real`."""

    def __init__(self, real: bool) -> None:
        self.real, self.seconds = real, 0.0

    def now(self) -> float:
        return time.perf_counter() if self.real else self.seconds

    def pass_until(self, moment: float) -> None:
        if self.real:
            time.sleep(max(0.0, moment - self.now()))
        self.seconds = max(self.seconds, moment)


class Late:
    """A collective that completes `DELAY` after it began, without using the processor."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self.work, self.clock, self.due = work, clock, clock.now() + DELAY

    def wait(self) -> None:
        self.work.wait()
        self.clock.pass_until(self.due)


def run_overlap(runtime: Runtime, size: int, busy: bool) -> dict[str, float]:
    """Seconds per forward and backward pass: without delays, with them, and with them while waiting at once.

    The attention takes longer than the delay: `busy`, because it computes, with as many sequences as that needs here;
    otherwise because it takes 1.3 of it on a clock on which nothing else takes time, so that the figures do not depend
    on the machine.
    """
    count, clock = 0, Clock(real=busy)

    def late(wait_at_once: bool) -> Any:
        def all_reduce(buffer: Tensor, **options: Any) -> Any:
            nonlocal count
            count += 1
            work = Late(dist.all_reduce(buffer, **options), clock)
            if wait_at_once:
                work.wait()
            return work

        return all_reduce

    def attend(*_: Any) -> None:
        clock.pass_until(clock.now() + 1.3 * DELAY)

    tokens = 512 if busy else 8
    config = KrakenConfig(4, OVERLAP_LAYERS, 64, 4, 64, tokens, ffn_multiplier=1)
    mesh = make_mesh(runtime, size)
    models = {
        "undelayed": make_model(config, mesh),
        "hidden": make_model(config, mesh, collective=late(wait_at_once=False)),
        "waiting": make_model(config, mesh, collective=late(wait_at_once=True)),
    }
    sequences, attention = 1, 1.3 * DELAY
    if busy:
        layer = models["undelayed"].layers[0].attention
        while True:
            attention = least_seconds(layer, torch.randn(4 // size, sequences, tokens, 64))
            if runtime.all_true(attention >= 1.3 * DELAY):
                break
            sequences += 1
    else:
        for model in models.values():
            for layer in model.layers:
                layer.attention.register_forward_pre_hook(attend)
                layer.attention.register_full_backward_pre_hook(attend)
    ids = torch.zeros(sequences, tokens, dtype=torch.long)
    least = dict.fromkeys(models, math.inf)
    for rounds in range(60 if busy else 1):
        for name, model in models.items():  # in turn, so that a slow moment of the machine meets all of them
            count = 0
            runtime.all_true(True)
            started = clock.now()
            model.loss(ids, ids).backward()
            least[name] = min(least[name], clock.now() - started)
        # What else the machine does only adds to a time, so the least are nearest to the truth, once they are known.
        delays = count * DELAY
        hidden, waiting = least["hidden"] - least["undelayed"], least["waiting"] - least["undelayed"]
        if runtime.all_true(rounds >= 10 and hidden <= 0.10 * delays and waiting >= 0.90 * delays):
            break
    return {**least, "delays": delays, "attention": attention}


@torch.no_grad()
def least_seconds(module: torch.nn.Module, streams: Tensor) -> float:
    least = math.inf
    for _ in range(10):
        started = time.perf_counter()
        module(streams)
        least = min(least, time.perf_counter() - started)
    return least
