"""How a step is computed."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed."""

    # DeepSpeed's ZeRO: 1 shards the optimizer state over the data-parallel ranks, 2 the gradients as well
    zero_stage: int
    # recompute the activations of attention and FFN in the backward pass instead of keeping them
    activation_checkpointing: bool
    # torch.compile attention, FFN and the loss; the first step then takes a minute; null: on a GPU, not on a CPU
    compile: bool | None
    # compute what lies between a Kraken's matrix products with Triton kernels; null: on a GPU where Triton is installed
    fused_kernels: bool | None = None

    def compiles(self, device_type: str) -> bool:
        """Whether to compile on devices of this type, a name of torch.device."""
        return device_type == "cuda" if self.compile is None else self.compile

    def validate(self) -> None:
        if self.zero_stage not in (1, 2):
            why = {
                0: "DeepSpeed's ZeRO-0 reports and clips wrong gradient norms in bf16, and stage 1 costs no more",
                3: "stage 3 shards the weights as well, which Kraken's sub-layers already do",
            }.get(self.zero_stage, "there is no such stage")
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is not supported ({why}); use 1 or 2")
