"""DeepSpeed behind a small interface: accumulate gradients, step, and hand out or take in the training state.

DeepSpeed itself is in `kraken_train.training.deepspeed_internals`. Which of its modes are used, and why:

- ZeRO-1 or 2, also in fp32: ZeRO-0 with bf16 reports and clips wrong gradient norms.
- bf16 weights with fp32 masters and fp32 accumulation of gradients.
- `overlap_comm: false`: races with it are open (deepspeedai/DeepSpeed#5545, #8061).
- A `torch.optim.AdamW` object, since the name "AdamW" compiles a CPU kernel for a minute; and our Muon
  (`kraken_train.training.muon`), not DeepSpeed's, which needs a whole matrix on a rank and one matrix in a weight.
- It neither computes the gradients' norm, nor clips, nor decides which steps to skip: it would read from the device
  several times a step. `Engine.update` does, on the device.
- Its checkpoints are not used; `checkpoints.training.writer` writes the state that `Engine.state` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kraken_train.config import TrainConfig
from kraken_train.kernels.selection import KERNELS_SETTING, use_kernels
from kraken_train.model.cross_entropy import Losses
from kraken_train.model.divergence import SoftTargets
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.rendezvous import RENDEZVOUS_SECONDS, Rendezvous, connect_ranks, launcher_holds_store
from kraken_train.parallel.replica_check import require_equal_replicas
from kraken_train.parallel.sharding import ShardedDim, sharded_dims
from kraken_train.parallel.step_timer import BACKWARD, FORWARD, OPTIMIZER, REDUCTION, StepTimer
from kraken_train.recipe.optimizers import MuonConfig
from kraken_train.recipe.parametrization import STANDARD, Parametrization
from kraken_train.settings.loss import LossConfig
from kraken_train.training import deepspeed_internals
from kraken_train.training.deepspeed_internals import (
    get_master_weight,
    get_optimizer_state,
    set_master_weight,
    set_optimizer_state,
)
from kraken_train.training.deepspeed_settings import deepspeed_settings
from kraken_train.training.optim import EMA, make_optimizer, parameter_groups, reduce_bucket_elements, state_names
from kraken_train.training.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    """Of an optimizer step, the same on all ranks."""

    loss: float  # cross-entropy in nats per token, mean over the global batch
    grad_norm: float  # before clipping, over the whole model
    applied: bool  # False: something was not finite, and no weight has changed on any rank
    stop: bool  # some rank has received a request to stop
    z_loss: float  # what it adds to the loss in the gradient, weighted; 0 without `loss.z_loss`
    divergence: float  # from the teacher, in nats per token, unweighted; 0 without `distill.teacher`


def start_processes(runtime: Runtime, seconds: float = RENDEZVOUS_SECONDS) -> Rendezvous:
    """Join the ranks of the run, within `seconds`, and claim this rank's device.

    Raises ConfigError where the ranks cannot meet, or where DeepSpeed is not what was tested.
    """
    deepspeed_internals.prepare()
    runtime.configure_device()
    store = connect_ranks(runtime, seconds)
    deepspeed_internals.join_process_group(runtime.backend)
    return Rendezvous(store, None if launcher_holds_store() else 0)


def stop_processes(runtime: Runtime) -> None:
    """Leave the process group, at the end of a run that has succeeded."""
    if runtime.world_size > 1:
        dist.destroy_process_group()


class Engine:
    """This rank's part of a model under DeepSpeed."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        mesh: ParallelMesh,
        runtime: Runtime,
        timer: StepTimer | None = None,
        parametrization: Parametrization = STANDARD,
    ) -> None:
        self.model = model
        self.teacher: Teacher | None = None  # set before the first step; no part of what DeepSpeed knows
        self.mesh = mesh
        self.runtime = runtime
        self.accumulation_steps = config.gradient_accumulation_steps(mesh.data_size)  # of the next step
        self.sharded_dims = sharded_dims(model)
        self.assigned = self.assign_parameters()
        model.recompute = config.engine.activation_checkpointing
        use_kernels(model, config.engine.fused_kernels, runtime.device, KERNELS_SETTING)
        if config.engine.compiles(runtime.device.type):
            model.compile_parts()
        with_muon = isinstance(config.optim, MuonConfig)
        groups = parameter_groups(model, config.optim.weight_decay, with_muon, parametrization)
        self.shared_groups = [index for index, group in enumerate(groups) if group["shared"]]
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.ema_decay = config.ema_decay
        average = () if config.ema_decay is None else (EMA,)
        self.states = {
            names[parameter]: (*state_names(group), *average) for group in groups for parameter in group["params"]
        }
        sizes = [parameter.numel() for parameter in names]
        bucket_elements = reduce_bucket_elements(sizes, config.engine.zero_stage)
        optimizer = make_optimizer(config.optim, groups, mesh.place, runtime.group)
        self.deepspeed = deepspeed_internals.initialize(
            LossModule(model, config.loss),
            optimizer,
            deepspeed_settings(config, mesh.data_size, bucket_elements),
            mesh,
            runtime.device,
        )
        reduce = deepspeed_internals.reduction_of(self.deepspeed)
        if deepspeed_internals.has_flat_gradients(self.deepspeed.optimizer):
            deepspeed_internals.replace_step(self.deepspeed.optimizer)
            reduce = self.average_gradients
        self.max_grad_norm = config.optim.max_grad_norm
        self.micro_losses: list[Losses] = []
        # Sums over ranks: of losses, of squares of gradients, of requests to stop, of z-losses, of divergences.
        self.reports: list[Tensor] = []
        self.timer = timer or StepTimer(runtime.device)
        # Part of `backward`. At stage 2 it is what is left after the sums during the backward pass.
        deepspeed_internals.replace_reduction(self.deepspeed, self.timer.phase(REDUCTION)(reduce))
        self.create_optimizer_state()

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    def set_batch_size(self, samples: int) -> None:
        """Set the size of the next step: samples over all ranks, one of those that the settings have.

        DeepSpeed divides the losses by the number of micro-batches; it has no other use of that number here.
        """
        self.deepspeed.set_train_batch_size(samples)
        self.accumulation_steps = self.deepspeed.gradient_accumulation_steps()

    def accumulate(self, input_ids: Tensor, targets: Tensor) -> None:
        """Forward and backward of one micro-batch, (micro_batch_size, context_length) each.

        The last one of a step reduces the gradients.
        """
        self.deepspeed.set_gradient_accumulation_boundary(len(self.micro_losses) + 1 == self.accumulation_steps)
        with self.timer.phase(FORWARD):
            # Nothing here keeps the soft targets, so that they are gone before the backward pass.
            losses: Losses = self.deepspeed(input_ids, targets, self.predictions_of_teacher(input_ids))
        with self.timer.phase(BACKWARD):
            self.deepspeed.backward(losses.objective)
        self.micro_losses.append(Losses(*(part.detach() for part in losses)))

    def predictions_of_teacher(self, input_ids: Tensor) -> SoftTargets | None:
        return None if self.teacher is None else self.teacher.predict(input_ids)

    def step(self, lr: float, stop: bool = False) -> None:
        """Update the weights with the accumulated gradients, unless a loss or gradient is not finite anywhere.

        `stop`: this rank has received a request to stop. Nothing waits for the device; `results` returns the outcome.
        """
        with self.timer.phase(OPTIMIZER):
            self.update(lr, stop)

    def results(self) -> list[StepResult]:
        """Of the steps since the last call, in their order. Waits for the device."""
        if not self.reports:
            return []
        reports, self.reports = torch.stack(self.reports).tolist(), []
        results = []
        world = self.runtime.world_size
        for loss_sum, squares, stopping, z_sum, divergence_sum in reports:
            applied = math.isfinite(loss_sum) and math.isfinite(squares)
            loss, norm = (loss_sum / world, math.sqrt(squares)) if applied else (math.nan, math.nan)
            results.append(StepResult(loss, norm, applied, stopping > 0, z_sum / world, divergence_sum / world))
        return results

    @torch.no_grad()
    def update(self, lr: float, stop: bool) -> None:
        _, loss, z_loss, divergence = (
            torch.stack(parts).double().mean() for parts in zip(*self.micro_losses, strict=True)
        )
        self.micro_losses = []
        # One all-reduce gives all ranks the mean loss, the gradients' norm and requests to stop; a non-finite sum makes
        # all of them skip the step together.
        report = torch.stack([loss, self.gradient_squares(), torch.full_like(loss, stop), z_loss, divergence])
        if self.runtime.world_size > 1:
            dist.all_reduce(report, group=self.runtime.group)
        self.reports.append(report)
        self.equalize_shared_gradients()  # not before what is not finite on one rank has counted
        loss_sum, squares = report[:2]
        optimizer = self.deepspeed.optimizer.optimizer
        # A fused AdamW reads these tensors of PyTorch's gradient scaler on the device: whether to skip the update, and
        # the divisor of the gradients, which here makes their norm `max_grad_norm`.
        optimizer.found_inf = (~torch.isfinite(loss_sum + squares)).float()
        if self.max_grad_norm > 0:
            optimizer.grad_scale = ((squares.sqrt() + 1e-6) / self.max_grad_norm).clamp(min=1.0).float()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self.deepspeed.step()
        if self.ema_decay is not None:
            self.average_weights(1 - self.ema_decay, optimizer.found_inf)

    def average_weights(self, weight: float, skipped: Tensor) -> None:
        """Move the average of this rank's weights towards them, unless the update was `skipped` (1, else 0).

        The average is one of the optimizer's states: it is divided over the copies, saved and resharded as these are.
        """
        optimizer = self.deepspeed.optimizer.optimizer
        for group in optimizer.param_groups:
            for part in group["params"]:
                optimizer.state[part][EMA].lerp_(part, weight * (1 - skipped))

    def average_gradients(self) -> None:
        """Of flat gradients, over the copies: each gets the mean of the part that it updates.

        What it keeps of the others' parts is not used, and cleared after the update. DeepSpeed's own sums all of it on
        each copy, and copies it to a buffer and back, even for one copy.
        """
        copies = self.mesh.data_size
        if copies > 1 and self.deepspeed.is_gradient_accumulation_boundary():
            # The part is a view of this copy's share, which NCCL and gloo sum in place.
            for gradients, part in deepspeed_internals.flat_gradients(self.deepspeed.optimizer):
                dist.reduce_scatter_tensor(part, gradients.div_(copies), group=self.mesh.get_data_parallel_group())

    def gradient_squares(self) -> Tensor:
        """Their sum here, in float64; the sum over all ranks is that over the whole model. Not finite if any is not."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, gradients in enumerate(deepspeed_internals.reduced_gradients(self.deepspeed.optimizer)):
            if gradients:
                # What the ranks of a copy share counts on the first of them; 0 times what is not finite is NaN.
                counts = 0.0 if index in self.shared_groups and self.mesh.model_rank.rank > 0 else 1.0
                squares += torch.nn.utils.get_total_norm(gradients).double().square() * counts
        return squares

    def equalize_shared_gradients(self) -> None:
        """Give the ranks of a copy the same gradients of shared parameters, bit for bit.

        Each rank has summed them over the copies in a group of its own, and nothing promises that NCCL adds in the same
        order in all of these groups. Ranks of a copy hold the same slices of these gradients.
        """
        if self.mesh.model_rank.size == 1:
            return
        gradients = deepspeed_internals.reduced_gradients(self.deepspeed.optimizer)
        for index in self.shared_groups:
            for gradient in gradients[index]:
                dist.broadcast(gradient, group=self.mesh.get_model_parallel_group(), group_src=0)

    def state(self) -> dict[str, Tensor]:
        """This rank's share of the training state, on the CPU, in copies. A collective.

        The state is the fp32 weights (`model.NAME`) and what the optimizer keeps for them (`optimizer.STATE.NAME`, by
        `states`). What the ranks of a copy hold parts of is a DTensor.
        """
        state = {}
        for name, parameter in self.model.named_parameters():
            tensors = {f"model.{name}": get_master_weight(parameter)}  # DeepSpeed makes new tensors
            for kept in self.states[name]:
                tensors[f"optimizer.{kept}.{name}"] = get_optimizer_state(parameter, kept)
            if name in self.assigned:
                partition = self.sharded_dims[name]
                state.update({key: self.mesh.as_global(part.cpu(), partition) for key, part in tensors.items()})
        return state

    @property
    def state_bytes(self) -> int:
        """Of what `state` returns on this rank."""
        sizes = {name: parameter.numel() * torch.float32.itemsize for name, parameter in self.model.named_parameters()}
        return sum(sizes[name] * (1 + len(self.states[name])) for name in self.assigned)

    def assign_parameters(self) -> set[str]:
        """The parameters that this rank keeps in `state`, so that memory and writing are shared evenly.

        One model copy keeps a parameter: each of its ranks the own part, or one of them all of a shared one.
        """
        copies, size = self.mesh.data_size, self.mesh.model_rank.size
        here = (self.mesh.data_rank, self.mesh.model_rank.rank)
        loads = {(copy, rank): 0 for copy in range(copies) for rank in range(size)}
        assigned = set()
        for name, parameter in self.model.named_parameters():
            owners, load = [min(loads, key=lambda place: loads[place])], parameter.numel()
            if (partition := self.sharded_dims[name]) is not None:
                owners = [(owners[0][0], rank) for rank in range(size)]
                load = partition.whole_shape(parameter.shape).numel() // size  # all ranks must count the same
            for owner in owners:
                loads[owner] += load
            if here in owners:
                assigned.add(name)
        return assigned

    def load_state(
        self, fill: Callable[[dict[str, Tensor]], None], optimizer_steps: int, with_average: bool = True
    ) -> None:
        """Load the state after `optimizer_steps` updates.

        `fill` puts values into tensors of the names that `state` gives and of any sharding; if not `with_average`, it
        has no average of the weights, which then begins as they are.
        """
        self.set_optimizer_steps(optimizer_steps)
        for name, parameter in self.model.named_parameters():
            states = [kept for kept in self.states[name] if with_average or kept != EMA]
            keys = [f"model.{name}", *(f"optimizer.{kept}.{name}" for kept in states)]
            parts = {key: torch.empty(parameter.shape, dtype=torch.float32) for key in keys}
            fill({key: self.mesh.as_global(part, self.sharded_dims[name]) for key, part in parts.items()})
            weight, *kept_values = [part.to(self.device) for part in parts.values()]
            self.set_weight(parameter, weight)
            for kept, value in zip(states, kept_values, strict=True):
                set_optimizer_state(parameter, value, kept)

    def load_weights(self, read: Callable[[str, ShardedDim | None], Tensor]) -> None:
        """Load the weights only; `read` gives this rank's part of the one of a name."""
        for name, parameter in self.model.named_parameters():
            self.set_weight(parameter, read(name, self.sharded_dims[name]).to(self.device, torch.float32))

    def set_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """What the optimizer changes, in fp32, and what the model computes with; an average begins anew."""
        set_master_weight(parameter, weight)
        parameter.data.copy_(weight)
        if self.ema_decay is not None:
            set_optimizer_state(parameter, weight, EMA)

    def master_parts(self) -> Iterator[tuple[str, Tensor | None]]:
        """Name of each weight, and the part of it in fp32 that this rank updates, flat; None where that is none."""
        for name, parameter in self.model.named_parameters():
            yield name, deepspeed_internals.master_part(parameter)

    def verify_replicas(self) -> None:
        """Check that weights which several ranks hold are the same bits there. A collective. Raises ReplicaError."""

        def held() -> Iterator[tuple[str, Tensor, bool]]:
            for name, parameter in self.model.named_parameters():
                shared = self.sharded_dims[name] is None
                yield name, parameter, shared
                if shared:
                    yield f"{name} (fp32)", get_master_weight(parameter), shared

        require_equal_replicas(held(), self.mesh.model_rank.size, self.runtime)

    def create_optimizer_state(self) -> None:
        """Make the optimizer's state, which otherwise appears with the first update, without changing a weight.

        DeepSpeed links parameters to their state after the first group's first update, when the second group has
        none yet, and so never finds that of the norms.
        """
        zero, optimizer = self.deepspeed.optimizer, self.deepspeed.optimizer.optimizer
        rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
            for partition in group["params"]:
                partition.grad = torch.zeros_like(partition)
        optimizer.step()
        for group, (lr, weight_decay) in zip(optimizer.param_groups, rates, strict=True):
            group.update(lr=lr, weight_decay=weight_decay)
            for partition in group["params"]:
                partition.grad = None
                if self.ema_decay is not None:
                    optimizer.state[partition][EMA] = partition.detach().clone()
        deepspeed_internals.link_optimizer_state(zero)
        self.set_optimizer_steps(0)

    def set_optimizer_steps(self, steps: int) -> None:
        for state in self.deepspeed.optimizer.optimizer.state.values():
            if "step" in state:  # of AdamW, which corrects its moments by it
                state["step"].fill_(steps)


class LossModule(nn.Module):
    """DeepSpeed hooks into `forward`; training's forward is the loss."""

    def __init__(self, model: LanguageModel, config: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, input_ids: Tensor, targets: Tensor, soft: SoftTargets | None) -> Losses:
        return self.model.losses(input_ids, targets, self.config.z_loss, soft)
