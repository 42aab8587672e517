"""What all architectures share: embeddings in, layers, the head and the loss out.

Shapes: B batch, T tokens, E width of the embedding, which is the hidden size unless a model says otherwise,
V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.cross_entropy import IGNORED, Losses
from kraken_train.model.divergence import SoftTargets
from kraken_train.model.documents import Documents
from kraken_train.model.embedding import Vocabulary
from kraken_train.model.layers import AttentionScope, FinalNorm, Layer
from kraken_train.model.rotary import Rotary, rotary_angles
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange, all_units


class LanguageModel(nn.Module):
    """What Kraken and the baselines share: embeddings in, the head and the loss out.

    A subclass has `layers` and turns the embedding into the last hidden state, (B, T, E) -> (B, T, E), layer by layer.
    """

    layers: Sequence[Layer]

    def __init__(self, config: ModelConfig, communicator: Communicator, vocabulary: UnitRange | None) -> None:
        super().__init__()
        self.config = config
        self.communicator = communicator
        self.context_length = config.context_length
        rows, width = vocabulary or all_units(config.vocab_size), config.embedding_width
        self.token_embedding = Vocabulary(rows, width, communicator)
        self.position_embedding = nn.Embedding(config.context_length, width) if config.positions == "learned" else None
        self.final_norm = FinalNorm(config)
        # If set, a token sees its own document only, but for tokens that continue those of caches; see `Documents`.
        self.end_of_document: int | None = None
        self.lm_head = None if config.tie_embeddings else Vocabulary(rows, width, communicator)

    @property
    def head(self) -> Vocabulary:
        """What turns the last hidden state into logits: the token embedding, or a matrix of its own."""
        return self.lm_head or self.token_embedding

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define hidden()")

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Of a layer's keys here: rows for each sequence, key-value heads G, head dimension K."""
        raise TypeError(f"{type(self).__name__} does not define cache_shape")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def recompute(self) -> bool:
        """Whether the layers compute activations again in the backward pass instead of keeping them."""
        return self.layers[0].recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for layer in self.layers:
            layer.recompute = value

    def forward(
        self, input_ids: Tensor, caches: Sequence[AttentionScope] | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V).

        With `caches` (one per layer) the tokens continue those that the caches hold; `positions`, (T,) or (B, T) and
        below `context_length`, then says where they stand, and by default they are the first ones. Raises ValueError
        where these are more than `context_length`.
        """
        return self.head.logits(self.last_hidden(input_ids, caches, positions))

    def last_hidden(
        self, input_ids: Tensor, caches: Sequence[AttentionScope] | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> what the head sees, (B, T, E)."""
        documents = None
        if self.end_of_document is not None and caches is None:
            documents = Documents.of(input_ids, self.end_of_document)
        if positions is None:
            tokens = input_ids.shape[1]
            if tokens > self.context_length:
                raise ValueError(f"{tokens} tokens are more than context_length={self.context_length}")
            positions = torch.arange(tokens, device=input_ids.device) if documents is None else documents.positions
        embedding: Tensor = self.token_embedding(input_ids)
        rotary = None
        if self.position_embedding is not None:
            embedding = embedding + self.position_embedding(positions)
        else:
            rotary = rotary_angles(positions, self.config.head_size, self.config.rope_theta, embedding.dtype)
        scopes: Sequence[AttentionScope | None] = caches or [None] * self.num_layers
        if documents is not None:
            rows_per_sequence, _, head_size = self.cache_shape
            scopes = [documents.attention(rows_per_sequence, head_size, embedding.dtype)] * self.num_layers
        hidden = self.hidden(embedding, rotary, scopes)
        normed: Tensor = self.final_norm(hidden)
        return normed

    def token_losses(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies in nats of `targets` (B, T) after `input_ids` (B, T), of at least float32, without gradients.

        Targets of -100 do not count and have 0.
        """
        return self.head.token_losses(self.last_hidden(input_ids), targets)

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """The mean of `token_losses` over the targets that count, a scalar."""
        return self.losses(input_ids, targets).objective

    def losses(
        self, input_ids: Tensor, targets: Tensor, z_weight: float = 0.0, soft: SoftTargets | None = None
    ) -> Losses:
        """The means over the targets that count; `z_weight` is the weight of the z-loss (see `model.cross_entropy`).

        `soft` are the predictions of a teacher for these tokens.
        """
        counted = (targets != IGNORED).sum()
        sums = self.head.losses(self.last_hidden(input_ids), targets, z_weight, soft)
        return Losses(*(total / counted for total in sums))

    def soft_targets(self, input_ids: Tensor, share: float, temperature: float) -> SoftTargets:
        """Of this model as a teacher, for token ids (B, T); see `losses`."""
        with torch.no_grad():
            return SoftTargets(self.last_hidden(input_ids), self.head.weight.detach(), share, temperature)

    def use_fused_kernels(self) -> bool:
        """Compute with `kraken_train.kernels` from now on; False where they do not fit its sizes.

        An architecture that has none computes as before.
        """
        return True

    def compile_parts(self) -> None:
        """Compile the parts of the layers, which share one compilation, and what the loss does to the logits."""
        self.head.cross_entropy.compile()
        for layer in self.layers:
            for part in layer.children():
                part.compile()
