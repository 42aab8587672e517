"""Training in plain PyTorch; the difference to the time of `kraken_train.training.engine` is the cost of DeepSpeed.

bf16 weights with fp32 masters, moments and accumulation, or fp32 throughout; AdamW; clipping by the norm over the whole
model; gradients summed over the copies once per step. It does the minimum: each copy holds all of the
optimizer's state (no ZeRO), nothing is read back from the device, and a step that is not finite is not skipped.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kraken_train.config import TrainConfig
from kraken_train.kernels.selection import KERNELS_SETTING, use_kernels
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import sharded_dims
from kraken_train.parallel.step_timer import BACKWARD, FORWARD, OPTIMIZER, REDUCTION, StepTimer
from kraken_train.training.optim import parameter_groups
from kraken_train.training.precision import DTYPES


class PlainEngine:
    """This rank's part of a model; takes steps as `kraken_train.training.engine.Engine` does."""

    def __init__(
        self, model: LanguageModel, config: TrainConfig, mesh: ParallelMesh, runtime: Runtime, timer: StepTimer
    ) -> None:
        self.model = model.to(runtime.device, DTYPES[config.precision])
        self.mesh = mesh
        self.device = runtime.device
        self.timer = timer
        self.accumulation_steps = config.gradient_accumulation_steps(mesh.data_size)
        self.max_grad_norm = config.optim.max_grad_norm
        model.recompute = config.engine.activation_checkpointing
        use_kernels(model, config.engine.fused_kernels, runtime.device, KERNELS_SETTING)
        if config.engine.compiles(runtime.device.type):
            model.compile_parts()
        cuts = sharded_dims(model)
        self.is_part = [cuts[name] is not None for name, _ in model.named_parameters()]
        self.weights: list[Tensor] = list(model.parameters())
        self.masters = self.weights
        if config.precision == "bf16":
            self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        master_of = dict(zip(self.weights, self.masters, strict=True))
        groups = parameter_groups(model, config.optim.weight_decay)
        self.optimizer = torch.optim.AdamW(
            [{**group, "params": [master_of[weight] for weight in group["params"]]} for group in groups],
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )
        self.micro_losses: list[Tensor] = []
        self.losses: list[Tensor] = []  # of steps, the mean over this rank's micro-batches

    @property
    def gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters if master.grad is not None]

    def accumulate(self, input_ids: Tensor, targets: Tensor) -> None:
        """Forward and backward of one micro-batch; the last one of a step reduces the gradients."""
        with self.timer.phase(FORWARD):
            loss = self.model.loss(input_ids, targets)
        with self.timer.phase(BACKWARD):
            (loss / self.accumulation_steps).backward()
            if self.masters is not self.weights:
                for master, weight in zip(self.masters, self.weights, strict=True):
                    master.grad.add_(weight.grad)  # type: ignore[union-attr, arg-type]
                    weight.grad = None
            self.micro_losses.append(loss.detach())
            if len(self.micro_losses) == self.accumulation_steps:
                with self.timer.phase(REDUCTION):
                    self.reduce_gradients()

    def reduce_gradients(self) -> None:
        """The mean over the copies."""
        if self.mesh.data_size == 1:
            return
        torch._foreach_div_(self.gradients, self.mesh.data_size)
        group = self.mesh.get_data_parallel_group()
        for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in self.gradients]:
            work.wait()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the weights with the accumulated gradients."""
        self.losses.append(torch.stack(self.micro_losses).double().mean())
        self.micro_losses = []
        with self.timer.phase(OPTIMIZER):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if self.max_grad_norm > 0:
                scale = (self.max_grad_norm / (self.grad_norm() + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(self.gradients, scale)
            self.optimizer.step()
            if self.masters is not self.weights:
                torch._foreach_copy_(self.weights, self.masters)
                torch._foreach_zero_(self.gradients)
            else:
                self.optimizer.zero_grad()

    def results(self) -> list[float]:
        """The losses of the steps since the last call, on this rank, in nats per token. Waits for the device."""
        losses, self.losses = torch.stack(self.losses).tolist(), []
        return losses

    def grad_norm(self) -> Tensor:
        """Over the whole model; parameters that the ranks of a copy share count once."""
        squares = torch.stack(torch._foreach_norm(self.gradients)).square()
        is_part = torch.tensor(self.is_part, device=squares.device)
        parts = squares.where(is_part, 0.0).sum()
        if self.mesh.model_rank.size > 1:
            dist.all_reduce(parts, group=self.mesh.get_model_parallel_group())
        return (parts + squares.where(~is_part, 0.0).sum()).sqrt()
