"""What a layer is made of: the settings that all architectures share. The defaults are GPT-2's, as in the paper."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_choice, require_positive

NORMS = ("layernorm", "rmsnorm")
FFNS = ("gelu", "swiglu")
POSITIONS = ("learned", "rope")


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    norm: str = "layernorm"  # layernorm (without bias) | rmsnorm
    ffn: str = "gelu"  # gelu | swiglu (three matrices instead of two)
    # inner width of an FFN; null: ffn_multiplier * hidden_size, with swiglu two thirds of that (as many parameters),
    # rounded to a multiple of 64
    ffn_hidden_size: int | None = None
    positions: str = "learned"  # learned: an embedding of each position | rope: rotary embeddings of queries and keys
    rope_theta: float = 10000.0  # base of the wavelengths of rope
    qk_norm: bool = False  # RMSNorm of each query and key over the head dimension, before rope
    tie_embeddings: bool = True  # the head is the token embedding; false: a matrix of its own
    head_dim: int | None = None  # width of an attention head; null: hidden_size / number of heads

    def validate_layers(self) -> None:
        """Raises ConfigError if one of these settings breaks a rule."""
        require_choice("model.norm", self.norm, NORMS)
        require_choice("model.ffn", self.ffn, FFNS)
        require_choice("model.positions", self.positions, POSITIONS)
        require_positive("model.rope_theta", self.rope_theta)
        for name in ("head_dim", "ffn_hidden_size"):
            if getattr(self, name) is not None:
                require_positive(f"model.{name}", getattr(self, name))

    def require_even_heads(self, head_size: int, source: str) -> None:
        """Raises ConfigError where rope cannot rotate heads of this width; `source` are the settings that make it."""
        if self.positions == "rope" and head_size % 2:
            raise ConfigError(
                f"{source} makes attention heads of width {head_size}, and model.positions=rope rotates pairs of "
                f"values, so the width must be even; use model.head_dim={head_size + 1} or model.positions=learned"
            )
