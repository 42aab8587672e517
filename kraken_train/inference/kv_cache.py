"""The key-value cache: allocated once, so that a new token takes the work of one token.

All shapes are fixed and all values that change from token to token are in tensors, so that a step can be compiled once
and captured in a CUDA graph.

Shapes: B batch, n rows of a layer for each sequence (a Kraken's sub-layers here, else 1), R = n B with the sequences of
a sub-layer side by side, G key-value heads, H heads, K head dimension, S capacity in tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import attend_causally

BIAS_ALIGNMENT = 8  # values, of PyTorch's memory-efficient attention


class KeyValueCache:
    """The cache of all layers of the part of a model that is here, for `batch_size` sequences.

    `prefill` and `decode` have one `layers.AttentionScope` per layer: the first begins all sequences anew, the second
    adds one token to each.
    """

    def __init__(self, model: LanguageModel, batch_size: int, capacity: int) -> None:
        rows_per_sequence, groups, head_dim = model.cache_shape
        weight = model.token_embedding.weight
        shape = (rows_per_sequence * batch_size, groups, capacity, head_dim)
        # Zeros, since values with weight 0 in the attention must be finite too.
        # A pair for each layer, not views of one tensor: compiled code copies aliases of what it writes to.
        pairs = [
            (weight.new_zeros(shape, requires_grad=False), weight.new_zeros(shape, requires_grad=False))
            for _ in range(model.num_layers)
        ]
        self.step = Step(rows_per_sequence, batch_size, capacity, weight.dtype, weight.device)
        self.prefill = [PrefillStore(keys, values) for keys, values in pairs]
        self.decode = [DecodeStore(keys, values, self.step) for keys, values in pairs]


class Step:
    """The positions of the next tokens of all sequences, for all layers."""

    def __init__(
        self, rows_per_sequence: int, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows_per_sequence = rows_per_sequence
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # tokens held, (B,)
        self.rows = torch.arange(rows_per_sequence * batch_size, device=device)  # (R,)
        self.positions = torch.zeros_like(self.rows)  # that the new token is written to, (R,)
        self.slots = torch.arange(capacity, device=device)  # (S,)
        # Added to the scores: 0 up to the new token, -inf after it. One for all layers, in the dtype of the scores and
        # with rows that begin where the GPU's attention wants them to, or each layer would make a copy of its own.
        aligned = -(-capacity // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
        self.bias = torch.zeros(len(self.rows), 1, 1, aligned, dtype=dtype, device=device)[..., :capacity]

    def begin(self) -> None:
        self.positions.copy_(self.lengths.repeat(self.rows_per_sequence))
        unseen = self.slots > self.positions[:, None]
        self.bias.zero_().masked_fill_(unseen[:, None, None], -torch.inf)

    def end(self) -> None:
        self.lengths += 1


class PrefillStore:
    """One layer's keys and values (R, G, S, K); a block of T tokens becomes the first ones.

    The padding of sequences padded on the right is stored too. No token attends to later ones, and the tokens that
    follow overwrite it.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (R, H, T, K), keys and values (R, G, T, K) -> (R, H, T, K)."""
        tokens = key.shape[2]
        self.keys[:, :, :tokens] = key
        self.values[:, :, :tokens] = value
        return attend_causally(query, key, value)


class DecodeStore:
    """The same memory; adds one token to each row, at the position in `step`."""

    def __init__(self, keys: Tensor, values: Tensor, step: Step) -> None:
        self.keys = keys
        self.values = values
        self.step = step

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (R, H, 1, K), keys and values (R, G, 1, K) -> (R, H, 1, K)."""
        self.keys[self.step.rows, :, self.step.positions] = key[:, :, 0]
        self.values[self.step.rows, :, self.step.positions] = value[:, :, 0]
        # The H / G heads of a group attend to the same tokens, so they can take the axis of query tokens.
        by_group = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        mixed = F.scaled_dot_product_attention(by_group, self.keys, self.values, attn_mask=self.step.bias)
        return mixed.reshape(query.shape)
