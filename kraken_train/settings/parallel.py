"""How the ranks of a run share the work."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import divisors, require_at_least, require_choice, require_positive
from kraken_train.model.config import ModelConfig

MOST_CTAS = 64  # NCCL's own limit
MOST_SPARED = 64  # multiprocessors; an A100 has 108, an H100 132


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a run share the work: `sub_layer_parallel_size` of them hold one copy of the model.

    The copies are data parallel. A Kraken is divided by sub-layers, a baseline by attention heads.
    """

    # ranks that share one copy of the model; it divides the number of ranks and the model's num_sub_layers (a GPT's
    # num_heads)
    sub_layer_parallel_size: int
    # shard the embedding, the head and the cross-entropy as well, by rows of the vocabulary; null: where several ranks
    # share a copy
    vocab_parallel: bool | None
    reduce_dtype: str | None  # bf16 | fp32: number format of the sums over the ranks of a copy; null: that of precision
    # optimizer steps between checks that equal weights are equal on all ranks; 0: only at the start and at checkpoints
    verify_every: int
    # on a GPU, the most blocks of NCCL's kernels for the sums over the ranks of a copy, each of which occupies a
    # multiprocessor; 0: NCCL's choice; null: 16 on Hopper GPUs, else 0
    max_ctas: int | None = None
    # on a GPU, multiprocessors that GEMMs leave free while such a sum is under way; null: 16 on Hopper GPUs, else 0
    sm_carveout: int | None = None

    def validate(self) -> None:
        require_positive("parallel.sub_layer_parallel_size", self.sub_layer_parallel_size)
        for name, limit in (("max_ctas", MOST_CTAS), ("sm_carveout", MOST_SPARED)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= limit:
                raise ConfigError(f"parallel.{name}={value} must be from 0 to {limit}, or null: by the device")
        if self.reduce_dtype is not None:
            require_choice("parallel.reduce_dtype", self.reduce_dtype, ("bf16", "fp32"))
        require_at_least("parallel.verify_every", self.verify_every, 0)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model among `world_size` ranks. Raises ConfigError."""
        size = self.sub_layer_parallel_size
        if world_size % size:
            raise ConfigError(
                f"parallel.sub_layer_parallel_size={size} does not divide the {world_size} "
                f"rank{'s' if world_size > 1 else ''} of this run; start a multiple of {size} ranks, or use "
                f"{' or '.join(divisors(world_size))}"
            )
        return world_size // size

    def require_fits(self, model: ModelConfig) -> None:
        """Raises ConfigError unless the ranks of a copy can share the model evenly."""
        size = self.sub_layer_parallel_size
        name, total = model.parallel_units
        if total % size:
            raise ConfigError(
                f"parallel.sub_layer_parallel_size={size} does not divide {name}={total}; use "
                f"{' or '.join(divisors(total))}"
            )
        if self.vocab_parallel and not self.can_share_vocabulary(model.vocab_size):
            raise ConfigError(
                f"parallel.vocab_parallel=true would leave one of parallel.sub_layer_parallel_size={size} ranks "
                f"without a row of model.vocab_size={model.vocab_size}; use parallel.vocab_parallel=false, or fewer "
                "ranks"
            )

    def can_share_vocabulary(self, vocab_size: int) -> bool:
        """Whether each rank of a copy would have some rows (`ModelRank.row_range`)."""
        size = self.sub_layer_parallel_size
        return (size - 1) * -(-vocab_size // size) < vocab_size

    def shares_vocabulary(self, vocab_size: int) -> bool:
        """Whether the ranks of a copy hold some rows of the vocabulary each, and not all."""
        if self.vocab_parallel is None:
            return self.sub_layer_parallel_size > 1 and self.can_share_vocabulary(vocab_size)
        return self.vocab_parallel
