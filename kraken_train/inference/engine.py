"""Computes the logits of a model for batches of prompts, token by token, on the device of its part.

The same code serves Kraken and the baselines, in one process and in several: each rank of a model copy has an engine
around its part, all call it with the same arguments, and all receive the same logits, bit for bit, because each rank
computes a share of them and all shares go to all ranks. Where only the most likely token is asked for, two numbers per
sequence and rank take the place of the logits.

Nothing here waits for the device: what is computed stays on it until the caller reads it.

Shapes: B sequences, T tokens, D hidden size, V vocabulary size, P ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.common.errors import ConfigError
from kraken_train.inference.graphs import CapturedFunction
from kraken_train.inference.head import MostLikely, ShardedHead
from kraken_train.inference.kv_cache import KeyValueCache
from kraken_train.kernels.selection import use_kernels
from kraken_train.model.attention_backends import attention_of_any_shape
from kraken_train.model.language_model import LanguageModel

SMALLEST_BUCKET = 64  # tokens; a prompt of fewer takes no less time on a GPU


@dataclass(frozen=True)
class ExecutionConfig:
    """How the engine runs a model; the results are the same."""

    compile: bool = False  # torch.compile the parts of the layers
    cuda_graphs: bool = False  # replay recorded kernels: for new tokens, and for prompts of `prefill_lengths`
    # tokens, ascending; a prompt is padded to the next one, if there is one; None: for `fitted` to choose
    prefill_lengths: tuple[int, ...] | None = ()
    fused_kernels: bool | None = False  # `kraken_train.kernels`; None: on a GPU where Triton is installed

    def validate(self) -> None:
        """Raises ConfigError."""
        lengths = self.lengths
        if any(length < 1 for length in lengths) or any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ConfigError(
                f"prefill_lengths={list(lengths)} must be numbers of tokens, each at least 1 and greater than the one "
                "before, as in [128,512]"
            )

    def require_device(self, device: torch.device) -> None:
        """Raises ConfigError."""
        if self.cuda_graphs and device.type != "cuda":
            raise ConfigError(f"cuda_graphs=true needs a GPU, and this runs on {device.type}; use cuda_graphs=false")

    def fitted(self, device: torch.device, prompt_tokens: int, capacity: int) -> ExecutionConfig:
        """With lengths for prompts of up to `prompt_tokens` on `device`, where they are not given.

        On a GPU these are few, none above `capacity`: kernels are chosen, and graphs recorded, for each of them.
        """
        if self.prefill_lengths is not None:
            return self
        return replace(self, prefill_lengths=buckets(prompt_tokens, capacity) if device.type == "cuda" else ())

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.prefill_lengths or ()

    def padded(self, tokens: int) -> int:
        """The length that a prompt of `tokens` is padded to."""
        return next((length for length in self.lengths if length >= tokens), tokens)


def buckets(longest: int, capacity: int) -> tuple[int, ...]:
    """Lengths for prompts of up to `longest` tokens: powers of two and their middles, from 64, at most `capacity`."""
    lengths: list[int] = []
    power = SMALLEST_BUCKET
    while not lengths or lengths[-1] < longest:
        lengths += [power, power + power // 2]
        power *= 2
    usable = [length for length in lengths if length < longest]
    return (*usable, min(lengths[len(usable)], capacity))


class InferenceEngine:
    """Continues up to `batch_size` sequences of up to `capacity` tokens each, prompt and new ones together.

    `model` is whole or a rank's part, with the whole embedding in both cases. Parts are compiled and CUDA graphs
    captured here and with the first prompts. Raises ConfigError where the device does not support `execution`, and
    ValueError where the sizes do not fit the model.
    """

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, batch_size: int, capacity: int, execution: ExecutionConfig | None = None
    ) -> None:
        self.execution = execution or ExecutionConfig()
        self.execution.validate()
        self.device = model.token_embedding.weight.device
        self.execution.require_device(self.device)
        if batch_size < 1 or not 1 <= capacity <= model.context_length:
            raise ValueError(f"no cache for {batch_size} x {capacity} tokens of a context of {model.context_length}")
        if any(length > capacity for length in self.execution.lengths):
            raise ValueError(f"prefill_lengths={list(self.execution.lengths)} exceed the capacity {capacity}")
        if not model.token_embedding.rows.is_whole:
            raise ValueError("the engine needs the whole embedding on each rank")
        self.model = model.eval()
        self.batch_size = batch_size
        self.capacity = capacity
        self.cache = KeyValueCache(model, batch_size, capacity)
        self.rows = torch.arange(batch_size, device=self.device)
        self.head = ShardedHead(model.head.weight.detach(), model.communicator)
        self.sequences = 0  # of the current batch
        self.tokens = 0  # at most in its longest sequence
        use_kernels(model, self.execution.fused_kernels, self.device, "fused_kernels")
        if self.execution.compile:
            model.compile_parts()
        # Not bound methods, whose reference cycles would keep this object's memory until a garbage collection.
        self.recorded_prefill: dict[int, CapturedFunction] = {}  # by padded length
        self.recorded_decode: CapturedFunction | None = None
        self.recorded_logits: CapturedFunction | None = None
        self.recorded_most_likely: CapturedFunction | None = None
        if self.execution.cuda_graphs:
            self.capture()

    def prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Begins a batch as `read_prompts` does. Returns the logits after the last token of each prompt, (B, V)."""
        return self.logits(self.read_prompts(input_ids, lengths))

    def decode(self, token_ids: Tensor) -> Tensor:
        """Adds tokens as `add_tokens` does. Returns the logits after them, (B, V)."""
        return self.logits(self.add_tokens(token_ids))

    @torch.inference_mode()
    def read_prompts(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Begins a batch: prompts (B, T), padded on the right to one length, of which row i has `lengths[i]` tokens.

        Returns what the head sees of the last token of each, (B, D). Arguments on the CPU are checked; those on a GPU
        are not, since that would wait for the GPU. Raises ValueError.
        """
        sequences, tokens = input_ids.shape
        self.require_prompts(input_ids, lengths)
        padded = self.execution.padded(tokens)
        missing = self.batch_size - sequences  # filled up with prompts of one token
        input_ids = pad(input_ids, (0, padded - tokens, 0, missing)).to(self.device)
        lengths = pad(lengths, (0, missing), value=1).to(self.device)
        self.sequences, self.tokens = sequences, tokens
        if padded in self.recorded_prefill:
            return self.recorded_prefill[padded](input_ids, lengths)[:sequences]
        with attention_of_any_shape(self.device):
            return self.compute_prefill(input_ids, lengths)[:sequences]

    @torch.inference_mode()
    def add_tokens(self, token_ids: Tensor) -> Tensor:
        """Adds a token to each sequence of the batch, (B,) ids, and returns what the head sees of it, (B, D).

        Raises ValueError without a batch, for another number of sequences, for ids as in `read_prompts`, and where the
        cache may be full: a batch that began with prompts (B, T) has room for `capacity - T` further tokens.
        """
        if token_ids.shape != (self.sequences,) or not self.sequences:
            raise ValueError(f"token ids of shape {tuple(token_ids.shape)} for {self.sequences} sequences")
        if self.tokens == self.capacity:
            raise ValueError(f"the cache is full: it has room for {self.capacity} tokens")
        self.require_tokens(token_ids)
        self.tokens += 1
        token_ids = pad(token_ids, (0, self.batch_size - self.sequences)).to(self.device)
        return (self.recorded_decode or self.compute_decode)(token_ids)[: self.sequences]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of `read_prompts` or `add_tokens`, (B, D) -> (B, V)."""
        hidden, sequences = self.filled_up(hidden), len(hidden)
        return (self.recorded_logits or self.head.logits)(hidden)[:sequences]

    @torch.inference_mode()
    def most_likely(self, hidden: Tensor, vocab_size: int | None = None) -> MostLikely:
        """Of `read_prompts` or `add_tokens`, (B, D) -> what `logits(hidden)[:, :vocab_size].argmax(-1)` gives, (B,).

        Ranks exchange two numbers per sequence instead of all logits.
        """
        words = self.model.token_embedding.rows.total if vocab_size is None else vocab_size
        hidden, sequences = self.filled_up(hidden), len(hidden)
        limit = torch.full((), words, device=self.device)
        winners = (self.recorded_most_likely or self.head.most_likely)(hidden, limit)[:sequences]
        return MostLikely.unpack(winners)

    def filled_up(self, hidden: Tensor) -> Tensor:
        """With as many rows as what is recorded takes."""
        return pad(hidden, (0, 0, 0, self.batch_size - len(hidden)))

    def compute_prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) and (B,) on the device, B being `batch_size` -> (B, D)."""
        hidden = self.model.last_hidden(input_ids, self.cache.prefill)
        self.cache.step.lengths.copy_(lengths)
        return hidden[self.rows, lengths - 1]

    def compute_decode(self, token_ids: Tensor) -> Tensor:
        """(B,) on the device, B being `batch_size` -> (B, D)."""
        step = self.cache.step
        step.begin()
        with attention_of_any_shape(self.device):  # one shape, but with a mask, which cuDNN is not the best at
            hidden = self.model.last_hidden(token_ids[:, None], self.cache.decode, step.lengths[:, None])
        step.end()
        return hidden[:, 0]

    def require_prompts(self, input_ids: Tensor, lengths: Tensor) -> None:
        sequences, tokens = input_ids.shape
        if not 1 <= sequences <= self.batch_size or not 1 <= tokens <= self.capacity or lengths.shape != (sequences,):
            raise ValueError(
                f"prompts of shape {tuple(input_ids.shape)} with lengths of shape {tuple(lengths.shape)} do not fit "
                f"an engine for {self.batch_size} sequences of {self.capacity} tokens"
            )
        if lengths.device.type == "cpu" and not ((lengths >= 1) & (lengths <= tokens)).all():
            raise ValueError(f"lengths={lengths.tolist()} of prompts must be between 1 and {tokens}")
        self.require_tokens(input_ids)

    def require_tokens(self, ids: Tensor) -> None:
        vocab_size = self.model.token_embedding.rows.total
        if ids.device.type == "cpu" and not ((ids >= 0) & (ids < vocab_size)).all():
            raise ValueError(f"token ids from {ids.min()} to {ids.max()}: the vocabulary has 0 to {vocab_size - 1}")

    def capture(self) -> None:
        """Capture CUDA graphs of decoding a token and of prompts of `prefill_lengths`."""
        pool = torch.cuda.graph_pool_handle()
        ones = torch.ones_like(self.rows)
        # The longest first: the others then use the memory that it has allocated.
        for length in reversed(self.execution.lengths):
            input_ids = ones[:, None].repeat(1, length)
            self.recorded_prefill[length] = CapturedFunction(self.compute_prefill, (input_ids, ones.clone()), pool)
        self.recorded_decode = CapturedFunction(
            self.compute_decode, (ones.clone(),), pool, self.cache.step.lengths.zero_
        )
        weight = self.head.weight
        hidden = weight.new_zeros(self.batch_size, weight.shape[1])
        limit = torch.full((), self.model.token_embedding.rows.total, device=self.device)
        self.recorded_logits = CapturedFunction(self.head.logits, (hidden,), pool)
        self.recorded_most_likely = CapturedFunction(self.head.most_likely, (hidden.clone(), limit), pool)


def pad(tensor: Tensor, amounts: tuple[int, ...], value: int = 0) -> Tensor:
    """`torch.nn.functional.pad` without the copy that it makes even if it adds nothing."""
    return F.pad(tensor, amounts, value=value) if any(amounts) else tensor
