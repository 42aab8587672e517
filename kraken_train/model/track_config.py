"""The settings of a Parallel Track Transformer, and what it declares about itself."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.model.architecture import (
    ATTENTION,
    FFN,
    NORM,
    RESIDUAL,
    AllReduces,
    LayerPart,
    ModelConfig,
)

PAPER = "https://arxiv.org/abs/2602.07306"


@dataclass(frozen=True)
class TrackConfig(ModelConfig):
    """A Parallel Track Transformer (arXiv 2602.07306): narrow standard Transformers that are summed now and then.

    Parameters of the paper recipe, with N = num_tracks, d = hidden_size, k the width of the keys, m = ffn_multiplier:
    L N ((2 + 2m) d^2 + 2dk + 2d) + V d + T d + d for tracks, embeddings and the final norm.
    """

    num_tracks: int  # narrow Transformers side by side; the ranks of a model copy divide them
    num_layers: int  # layers
    hidden_size: int  # width of each track's residual stream
    heads_per_track: int  # attention heads of each track
    # rows of the embedding; null: the data's vocabulary, rounded up to a multiple of 64 (GPT-2's 50257 is 50304)
    vocab_size: int
    context_length: int  # tokens of a sample
    sync_every: int = 4  # layers after which what the tracks have added is summed; after the last layer in any case
    ffn_multiplier: int = 4  # width of a track's FFN, in units of hidden_size
    norm_epsilon: float = 1e-5  # added to the variance in norms
    # key-value heads of each track: fewer than heads is grouped-query attention, 1 multi-query; null: as many as heads
    kv_heads_per_track: int | None = None
    architecture: str = "track"  # class of the model

    architectures = ("track",)
    model_class = "kraken_train.model.track.TrackModel"
    heads_setting = "heads_per_track"
    kv_heads_setting = "kv_heads_per_track"
    units_setting = "num_tracks"
    has_mup_rules = False
    color = "#7b5ea7"

    @property
    def num_streams(self) -> int:
        return self.num_tracks

    @property
    def layer_period(self) -> int:
        return self.sync_every

    @property
    def sums(self) -> int:
        """Forward, in a micro-batch."""
        return -(-self.num_layers // self.sync_every)

    @property
    def hidden_norms(self) -> int:
        return 2 * self.num_layers * self.num_tracks + 1

    @property
    def parallel_units(self) -> tuple[str, int]:
        """The tracks."""
        return "model.num_tracks", self.num_tracks

    def layer_parts(self, ranks: int) -> dict[str, LayerPart]:
        here = self.num_tracks // ranks
        own = here * self.hidden_size
        ffn = ((NORM, own), (RESIDUAL, own), *self.ffn_passes(here, 1))
        return {
            ATTENTION: LayerPart(self.attention_matrices(here, 1), ((NORM, own), *self.attention_passes(here, 1))),
            FFN: LayerPart(self.ffn_matrices(here, 1), ffn),
        }

    @property
    def all_reduces(self) -> tuple[AllReduces, ...]:
        return (AllReduces("sum of the tracks, and of its gradient", 2 * self.sums, self.hidden_size),)

    @property
    def title(self) -> str:
        return f"{self.num_tracks}-track Transformer, summed every {self.sync_every} layers"

    @property
    def introduction(self) -> str:
        return (
            f"A language model of the Parallel Track architecture ([arXiv 2602.07306]({PAPER})) with "
            f"{self.num_parameters:,} parameters: {self.num_tracks} narrow Transformers, which as many devices can "
            f"share, are summed every {self.sync_every} layers."
        )
