"""What the settings of architectures have in common whose layers are those of a GPT and shared as in Megatron-LM."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.model.architecture import ADD, ATTENTION, FFN, NORM, Config, LayerPart, ModelConfig


@dataclass(frozen=True)
class TensorParallelConfig(ModelConfig):
    """One residual stream, equal on all ranks, which share the heads of each layer and the inner width of its FFN.

    Source: Megatron-LM, arXiv 1909.08053, section 3. A subclass has `architecture` as a further field.
    """

    num_layers: int  # layers
    hidden_size: int  # width of the residual stream
    num_heads: int  # attention heads; tensor parallelism divides them
    # rows of the embedding; null: the data's vocabulary, rounded up to a multiple of 64 (GPT-2's 50257 is 50304)
    vocab_size: int
    context_length: int  # tokens of a sample
    ffn_multiplier: int = 4  # width of the FFN, in units of hidden_size
    norm_epsilon: float = 1e-5  # added to the variance in norms
    # key-value heads: fewer than heads is grouped-query attention, 1 multi-query; null: as many as heads
    num_kv_heads: int | None = None

    heads_setting = "num_heads"
    kv_heads_setting = "num_kv_heads"
    is_baseline = True

    def validate(self) -> None:
        super().validate()
        if self.ffn_size % self.kv_heads:  # the ranks of a copy share both
            name, kv_heads = self.parallel_units
            below, above = (self.ffn_size // kv_heads + more for more in (0, 1))
            raise ConfigError(
                f"model.ffn_hidden_size={self.ffn_size} is not a multiple of {name}={kv_heads}, and the ranks of a "
                f"model copy share the FFN with the heads; use {f'{below * kv_heads} or ' if below else ''}"
                f"{above * kv_heads}"
            )

    @property
    def swiglu_step(self) -> int:
        return math.lcm(super().swiglu_step, self.heads)

    @property
    def hidden_norms(self) -> int:
        return 2 * self.num_layers + 1

    @property
    def parallel_units(self) -> tuple[str, int]:
        """Key-value heads, with the heads that they serve and a part of the FFN."""
        return f"model.{self.heads_setting if self.num_kv_heads is None else self.kv_heads_setting}", self.kv_heads

    def layer_parts(self, ranks: int) -> dict[str, LayerPart]:
        add_norm = ((NORM, self.hidden_size), (ADD, self.hidden_size))
        return {
            ATTENTION: LayerPart(self.attention_matrices(1, ranks), (*add_norm, *self.attention_passes(1, ranks))),
            FFN: LayerPart(self.ffn_matrices(1, ranks), (*add_norm, *self.ffn_passes(1, ranks))),
        }

    def serving_units(self, devices: int) -> tuple[str, int]:
        """Where there are more devices than key-value heads, copies of these count: each with a part of the heads.

        Every device has one then; a key-value head has at most as many copies as it serves heads.
        """
        if self.kv_heads >= devices:
            return self.parallel_units
        most = self.heads // self.kv_heads
        copies = [r for r in range(1, most + 1) if most % r == 0 and self.ffn_size % (r * self.kv_heads) == 0]
        enough = (r for r in copies if r * self.kv_heads >= devices)
        return f"model.{self.heads_setting}", next(enough, copies[-1]) * self.kv_heads

    def served_with(self: Config, units: int) -> Config:
        return self if units == self.kv_heads else self.replace(num_kv_heads=units, ffn_hidden_size=self.ffn_size)
