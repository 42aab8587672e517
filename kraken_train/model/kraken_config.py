"""The settings of a Kraken, and what it declares about itself."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.model.architecture import (
    ATTENTION,
    FFN,
    NORM,
    READ_STREAM,
    RESIDUAL,
    SUM_OF_STREAMS,
    AllReduces,
    LayerPart,
    Matrix,
    ModelConfig,
)

PAPER = "https://arxiv.org/abs/2408.07802"


@dataclass(frozen=True)
class KrakenConfig(ModelConfig):
    """A Kraken model (arXiv 2408.07802, section 3): every layer is `num_sub_layers` narrow sub-layers.

    The product `num_sub_layers * heads_per_sub_layer` is the total number of heads of a layer. Parameters of the
    paper's models, with d = hidden_size, k the width of the keys, m = ffn_multiplier:
    L N ((2 + 2m) d^2 + 2dk + 2d) + V d + T d + N d^2 + d for sub-layers, embeddings, conjunction and final norm.
    With e = embedding_size the last four are V e + T e + 2N d e + e, of which N d e are the maps into the streams.
    """

    num_sub_layers: int  # narrow sub-layers of each layer; sub-layer parallelism divides them
    num_layers: int  # layers
    hidden_size: int  # width of each sub-layer's own residual stream
    heads_per_sub_layer: int  # attention heads of each sub-layer
    # rows of the embedding; null: the data's vocabulary, rounded up to a multiple of 64 (GPT-2's 50257 is 50304)
    vocab_size: int
    context_length: int  # tokens of a sample
    ffn_multiplier: int = 2  # width of a sub-layer's FFN, in units of hidden_size
    norm_epsilon: float = 1e-5  # added to the variance in norms
    # key-value heads of each sub-layer: fewer than heads is grouped-query attention, 1 multi-query; null: as many as
    # heads
    kv_heads_per_sub_layer: int | None = None
    # the FFN reads the sub-layer's own stream beside its attention and the sum, LN2_i(x_i + a_i + s) instead of
    # LN2_i(a_i + s); false: as in the paper
    ffn_reads_stream: bool = False
    # width of the embeddings and of the head; each sub-layer has a map from it into its stream, and the conjunction
    # leads back to it; null: hidden_size without maps, as in the paper
    embedding_size: int | None = None
    architecture: str = "kraken"  # class of the model

    architectures = ("kraken",)
    model_class = "kraken_train.model.kraken.KrakenModel"
    heads_setting = "heads_per_sub_layer"
    kv_heads_setting = "kv_heads_per_sub_layer"
    units_setting = "num_sub_layers"
    first_export_format = 1
    color = "#d1495b"

    @property
    def num_streams(self) -> int:
        return self.num_sub_layers

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def hidden_norms(self) -> int:
        return 2 * self.num_layers * self.num_sub_layers + 1

    @property
    def parallel_units(self) -> tuple[str, int]:
        """The sub-layers."""
        return "model.num_sub_layers", self.num_sub_layers

    def layer_parts(self, ranks: int) -> dict[str, LayerPart]:
        here, d = self.num_sub_layers // ranks, self.hidden_size
        own = here * d
        attention = ((NORM, own), (SUM_OF_STREAMS, own + d), *self.attention_passes(here, 1))
        ffn = ((NORM, own), (SUM_OF_STREAMS, d), (RESIDUAL, own), *self.ffn_passes(here, 1))
        if self.ffn_reads_stream:
            ffn += ((READ_STREAM, own),)
        return {
            ATTENTION: LayerPart(self.attention_matrices(here, 1), attention),
            FFN: LayerPart(self.ffn_matrices(here, 1), ffn),
        }

    def first_matrices(self, ranks: int) -> tuple[Matrix, ...]:
        """The maps from the embedding into the streams, if it has a width of its own."""
        if self.embedding_size is None:
            return ()
        return (Matrix(self.embedding_size, self.hidden_size, self.num_sub_layers // ranks),)

    def last_matrices(self, ranks: int) -> tuple[Matrix, ...]:
        """The conjunction."""
        return (Matrix(self.hidden_size, self.embedding_width, self.num_sub_layers // ranks),)

    @property
    def all_reduces(self) -> tuple[AllReduces, ...]:
        """The sum over the sub-layers hides behind the attention of the next layer.

        The first layer has none where all streams start as the embedding.
        """
        sums = self.num_layers - (self.embedding_size is None)
        return (
            AllReduces("sum of the sub-layers, and of its gradient", 2 * sums, self.hidden_size, behind=ATTENTION),
            AllReduces("conjunction, and gradient of the embedding", 2, self.embedding_width),
        )

    @property
    def title(self) -> str:
        return f"{self.num_sub_layers}-way Kraken"

    @property
    def introduction(self) -> str:
        return (
            f"A language model of the Kraken architecture ([arXiv 2408.07802]({PAPER})) with {self.num_parameters:,} "
            f"parameters: each layer is {self.num_sub_layers} independent sub-layers, which as many devices can share."
        )
