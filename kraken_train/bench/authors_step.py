"""The training step of the authors' code, rewritten from its description, as a baseline for the speed of training.

Their code is nanoGPT's with another model: every sub-layer is a module of its own and a Python loop runs them one after
the other; weights in fp32 under autocast; all logits at once; clipping and AdamW of PyTorch; the whole model compiled.
The paper is arXiv 2408.07802; `checkpoints.exports.reference` has the names of their weights.

Shapes: N sub-layers, B batch, T tokens, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.common.errors import ConfigError
from kraken_train.config import TrainConfig
from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.step_timer import BACKWARD, FORWARD, OPTIMIZER, StepTimer

MATRIX_DIMENSIONS = 2  # theirs: what has so many is decayed


class SubLayer(nn.Module):
    """x + a + FFN(LN2(a + s)) with a = MHA(LN1(x)), each (B, T, D)."""

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_size
        self.heads, self.head_size = config.heads, config.head_size
        self.norm_1 = nn.LayerNorm(width, config.norm_epsilon, bias=False)
        self.norm_2 = nn.LayerNorm(width, config.norm_epsilon, bias=False)
        self.qkv = nn.Linear(width, 3 * config.query_size, bias=False)
        self.out = nn.Linear(config.query_size, width, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        by_head = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, self.head_size))
        query, key, value = by_head.permute(2, 0, 3, 1, 4)  # (B, heads, T, head dimension) each
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = self.out(mixed.transpose(1, 2).flatten(2))
        inner = F.gelu(self.up(self.norm_2(attended + total)), approximate="tanh")
        return cast(Tensor, x + attended + self.down(inner))


class LoopedKraken(nn.Module):
    """The weights and the loss of a `KrakenModel` that is whole in this process."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        config = require_paper_layers(model.config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.layers = nn.ModuleList(
            nn.ModuleList(SubLayer(config) for _ in range(config.num_sub_layers)) for _ in range(config.num_layers)
        )
        self.conjunction = nn.Linear(config.num_sub_layers * config.hidden_size, config.hidden_size, bias=False)
        self.final_norm = nn.LayerNorm(config.hidden_size, config.norm_epsilon, bias=False)
        self.load_stacked(model.state_dict())

    @torch.no_grad()
    def load_stacked(self, stacked: dict[str, Tensor]) -> None:
        names = {"norm_1": "attention.norm", "qkv": "attention.qkv", "out": "attention.out"}
        names |= {"norm_2": "ffn.norm", "up": "ffn.up", "down": "ffn.down"}
        for number, layer in enumerate(self.layers):
            for index, sub_layer in enumerate(cast(nn.ModuleList, layer)):
                for own, theirs in names.items():
                    sub_layer.get_parameter(f"{own}.weight").copy_(stacked[f"layers.{number}.{theirs}.weight"][index])
        self.conjunction.weight.copy_(torch.cat(list(stacked["conjunction.weight"]), dim=1))
        for own in ("token_embedding", "position_embedding", "final_norm"):
            self.get_parameter(f"{own}.weight").copy_(stacked[f"{own}.weight"])

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Token ids and targets (B, T) -> the mean cross-entropy in nats, a scalar."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedding = self.token_embedding(input_ids) + self.position_embedding(positions)
        streams, total = [embedding] * len(cast(nn.ModuleList, self.layers[0])), embedding
        for layer in self.layers:
            sub_layers = cast(nn.ModuleList, layer)
            streams = [sub_layer(stream, total) for sub_layer, stream in zip(sub_layers, streams, strict=True)]
            total = torch.stack(streams).sum(dim=0)
        hidden = self.final_norm(self.conjunction(torch.cat(streams, dim=-1)))
        logits = F.linear(hidden, self.token_embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def require_paper_layers(config: object) -> KrakenConfig:
    """Raises ConfigError for what their code does not have."""
    if not isinstance(config, KrakenConfig):
        raise ConfigError("their code trains Krakens only")
    paper = {
        "norm": "layernorm", "ffn": "gelu", "positions": "learned", "qk_norm": False, "tie_embeddings": True,
        "ffn_reads_stream": False, "embedding_size": None,
    }  # fmt: skip
    for name, value in paper.items():
        if getattr(config, name) != value:
            raise ConfigError(f"their code has {name}={value} only, not {getattr(config, name)}")
    if config.kv_heads != config.heads:
        raise ConfigError("their code has as many key-value heads as heads")
    return config


class AuthorsStep:
    """Takes steps as `kraken_train.training.engine.Engine` does, in one process."""

    def __init__(
        self, model: LanguageModel, config: TrainConfig, mesh: ParallelMesh, runtime: Runtime, timer: StepTimer
    ) -> None:
        self.model = LoopedKraken(model).to(runtime.device)
        self.run: Callable[..., Any] = (
            torch.compile(self.model) if config.engine.compiles(runtime.device.type) else self.model
        )
        self.device = runtime.device
        self.autocast = config.precision == "bf16"
        self.timer = timer
        self.accumulation_steps = config.gradient_accumulation_steps(mesh.data_size)
        self.max_grad_norm = config.optim.max_grad_norm
        decayed = [weight for weight in self.model.parameters() if weight.dim() >= MATRIX_DIMENSIONS]
        others = [weight for weight in self.model.parameters() if weight.dim() < MATRIX_DIMENSIONS]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=runtime.device.type == "cuda",  # as nanoGPT does
        )
        self.micro_losses: list[Tensor] = []
        self.losses: list[Tensor] = []  # of steps

    def accumulate(self, input_ids: Tensor, targets: Tensor) -> None:
        """Forward and backward of one micro-batch."""
        with self.timer.phase(FORWARD), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.run(input_ids, targets)
        with self.timer.phase(BACKWARD):
            (loss / self.accumulation_steps).backward()
        self.micro_losses.append(loss.detach())

    def step(self, lr: float) -> None:
        """Update the weights with the accumulated gradients."""
        self.losses.append(torch.stack(self.micro_losses).double().mean())
        self.micro_losses = []
        with self.timer.phase(OPTIMIZER):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if self.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def results(self) -> list[float]:
        """The losses of the steps since the last call, in nats per token. Waits for the device."""
        losses, self.losses = torch.stack(self.losses).tolist(), []
        return losses
