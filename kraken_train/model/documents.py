"""Attention within documents: no token sees one of another document, and positions begin anew in each.

The end-of-document token comes after each document of prepared data. It is the last token that is predicted from a
document, and the first one that the next document sees, at position 0: generation begins with this token as well. So
every target counts, each is predicted from its own document alone, and documents in a sample give what they would give
one by one. The first document of a sample, whose beginning the sample may lack, begins at the sample's first token.

Shapes: B batch, T tokens, R = n B rows of a layer with the sequences of each sub-layer side by side, H heads, G
key-value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kraken_train.model.layers import AttentionScope, attend_causally

BLOCK = 128  # tokens, of FlexAttention's masks
FLEX_HEAD_SIZE = 16  # the smallest of FlexAttention


@dataclass(frozen=True)
class Documents:
    """The documents of a batch. Made on the batch's device, without waiting for it."""

    begins: Tensor  # for each token, the place in its sample where its document begins, (B, T)

    @classmethod
    def of(cls, input_ids: Tensor, end_of_document: int) -> Documents:
        """Those of token ids (B, T)."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return cls(torch.where(input_ids == end_of_document, places, 0).cummax(dim=1).values)

    @property
    def positions(self) -> Tensor:
        """Of each token in its document, (B, T)."""
        return torch.arange(self.begins.shape[1], device=self.begins.device) - self.begins

    @property
    def attended(self) -> Tensor:
        """To how many tokens one attends in the mean, its own counting half, a scalar (T / 2 for one document)."""
        return self.positions.double().mean() + 0.5

    def attention(self, rows_per_sequence: int, head_size: int, dtype: torch.dtype) -> AttentionScope:
        """What attends within these documents, in all layers: it is made once for a micro-batch.

        On a GPU that is FlexAttention, which skips what no token sees, makes no mask of T x T values and does not wait
        for the device.
        """
        on_gpu = self.begins.device.type == "cuda"
        kernel = "flex" if on_gpu and dtype != torch.float64 and head_size >= FLEX_HEAD_SIZE else "mask"
        return KERNELS[kernel](self.begins, rows_per_sequence, dtype)


class MaskedAttention:
    """PyTorch's attention with a mask."""

    def __init__(self, begins: Tensor, rows_per_sequence: int, dtype: torch.dtype) -> None:
        places = torch.arange(begins.shape[1], device=begins.device)
        seen = (places <= places[:, None]) & (places >= begins[..., None])
        # Added to the scores, in their dtype: each layer would make that of truth values itself.
        self.bias = torch.zeros(seen.shape, dtype=dtype, device=begins.device).masked_fill_(~seen, -torch.inf)[:, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (R, H, T, K), keys and values (R, G, T, K) -> (R, H, T, K)."""
        batch = len(self.bias)
        if len(query) == batch:
            return attend_causally(query, key, value, self.bias)
        # One mask of the batch serves each sub-layer.
        sub_layers = zip(query.split(batch), key.split(batch), value.split(batch), strict=True)
        return torch.cat([attend_causally(*parts, self.bias) for parts in sub_layers])


class FlexAttention:
    """`torch.nn.attention.flex_attention` (arXiv 2412.05496)."""

    def __init__(self, begins: Tensor, rows_per_sequence: int, dtype: torch.dtype) -> None:
        self.block_mask = block_mask(begins.repeat(rows_per_sequence, 1))
        self.kernel = flex_attention(compiled=begins.is_cuda)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (R, H, T, K), keys and values (R, G, T, K) -> (R, H, T, K)."""
        grouped = query.shape[1] > key.shape[1]
        mixed: Tensor = self.kernel(query, key, value, block_mask=self.block_mask, enable_gqa=grouped)
        return mixed


@cache
def flex_attention(compiled: bool) -> Callable[..., Any]:
    """Its kernels exist only compiled; on a CPU it serves tests, and is not."""
    from torch.nn.attention import flex_attention as flex  # noqa: PLC0415 (takes seconds)

    plain: Callable[..., Any] = flex.flex_attention
    return torch.compile(plain, dynamic=False) if compiled else plain


def block_mask(begins: Tensor) -> Any:
    """(R, T) -> FlexAttention's BlockMask.

    As documents follow each other, a block of queries sees the blocks of keys from that where the document of its first
    query begins to its own one, and all of those that begin no earlier than the document of its last query, but its
    own. So this takes operations on blocks only, not on T x T values as `create_block_mask` does.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415 (takes seconds)

    tokens = begins.shape[1]
    blocks = torch.arange(-(-tokens // BLOCK), device=begins.device)
    first_seen = begins[:, ::BLOCK] // BLOCK
    first_whole = -(-begins[:, BLOCK - 1 :: BLOCK] // BLOCK)  # lacks the last block of queries where that is not full
    first_whole = torch.nn.functional.pad(first_whole, (0, len(blocks) - first_whole.shape[1]), value=len(blocks))
    seen = (blocks >= first_seen[..., None]) & (blocks <= blocks[:, None])
    whole = (blocks >= first_whole[..., None]) & (blocks < blocks[:, None])
    begins = begins.to(torch.int32)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= begins[row, query])

    return BlockMask.from_kv_blocks(
        *in_order(seen & ~whole), *in_order(whole), BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(R, Q, N) truth values -> how many of the last axis are true, (R, 1, Q), and their places first, (R, 1, Q, N)."""
    counts = chosen.sum(dim=-1, dtype=torch.int32)
    places = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], places[:, None].contiguous()


class VariableLengthAttention:
    """`torch.nn.attention.varlen`, which is FlashAttention over sequences of any lengths, in 16 bits on a GPU.

    Making it waits for the device, for the number of documents.
    """

    def __init__(self, begins: Tensor, rows_per_sequence: int, dtype: torch.dtype) -> None:
        self.tokens = begins.shape[1]
        places = torch.arange(self.tokens, device=begins.device)
        starts = (begins == places).repeat(rows_per_sequence, 1).flatten().nonzero().squeeze(1)
        end = starts.new_tensor([rows_per_sequence * begins.numel()])
        self.starts = torch.cat([starts, end]).to(torch.int32)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (R, H, T, K), keys and values (R, G, T, K) -> (R, H, T, K)."""
        from torch.nn.attention import varlen  # noqa: PLC0415 (from PyTorch 2.10 on)

        joint = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
        lengths = (self.starts, self.starts, self.tokens, self.tokens)
        attend: Callable[..., Any] = varlen.varlen_attn
        mixed = attend(*joint, *lengths, window_size=(-1, 0), enable_gqa=query.shape[1] > key.shape[1])
        by_row: Tensor = mixed.unflatten(0, (len(query), self.tokens))
        return by_row.transpose(1, 2)


KERNELS: dict[str, Callable[[Tensor, int, torch.dtype], AttentionScope]] = {
    "mask": MaskedAttention,
    "flex": FlexAttention,
    "varlen": VariableLengthAttention,
}
