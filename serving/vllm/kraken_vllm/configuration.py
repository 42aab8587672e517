"""The config.json of an export, and which exports can be served by how many ranks. Imports no PyTorch and no vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

FORMAT_VERSION = 5  # the newest that this plugin reads
CHOICES = {"norm": ("layernorm", "rmsnorm"), "ffn": ("gelu", "swiglu"), "positions": ("learned", "rope")}
# Head dimensions for which the attention kernels of CPUs and GPUs are built; a head is padded to the next one.
KERNEL_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True)
class Architecture:
    """How the settings of an architecture are called, and what the ranks share."""

    heads: str = "num_heads"
    kv_heads: str = "num_kv_heads"  # may be None in config.json, for as many as heads
    ffn_multiplier: int = 4
    streams: str | None = None  # residual streams side by side, each with heads of its own; None: one
    first_format: int = 2  # the first format_version with today's order of weights
    hides_sums: bool = False  # whether sums over the ranks are under way while a layer computes
    further: tuple[tuple[str, Any], ...] = ()  # other settings of its own, with their defaults

    @property
    def is_stacked(self) -> bool:
        """Whether ranks share the streams; otherwise they share the heads and the FFN's inner width."""
        return self.streams is not None


ARCHITECTURES = {
    "kraken": Architecture(
        "heads_per_sub_layer", "kv_heads_per_sub_layer", 2, "num_sub_layers",
        first_format=1, hides_sums=True, further=(("ffn_reads_stream", False), ("embedding_size", None)),
    ),
    "standard": Architecture(),
    "parallel": Architecture(),
    "track": Architecture("heads_per_track", "kv_heads_per_track", 4, "num_tracks", further=(("sync_every", 4),)),
    "ladder": Architecture(hides_sums=True, further=(("ladder_layers", None),)),
    "fal": Architecture(),
}  # fmt: skip


class KrakenConfig(PretrainedConfig):
    """The settings of an export, under their own names and those that vLLM asks for. Raises ValueError.

    The class in the export's modeling_kraken.py has the same settings; with this one the export serves without
    `trust_remote_code`.
    """

    model_type = "kraken"
    attribute_map = {  # noqa: RUF012 (as the library declares it)
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "context_length",
    }

    def __init__(
        self,
        architecture: str = "kraken",
        num_layers: int = 2,
        hidden_size: int = 32,
        vocab_size: int = 256,
        context_length: int = 512,  # tokens
        norm: str = "layernorm",  # or rmsnorm
        norm_epsilon: float = 1e-5,
        ffn: str = "gelu",  # or swiglu
        ffn_hidden_size: int | None = None,  # None: as `intermediate_size` derives it
        positions: str = "learned",  # or rope
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        head_dim: int | None = None,  # None: hidden_size / heads
        tie_embeddings: bool = True,
        tie_word_embeddings: bool | None = None,  # the library's name of `tie_embeddings`
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        format_version: int = FORMAT_VERSION,
        overlap: bool = True,  # not in an export: false: ranks wait for sums that could be hidden
        **kwargs: Any,
    ) -> None:
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture={architecture} in config.json is not known to this kraken-vllm, which serves "
                f"{', '.join(ARCHITECTURES)}; serve it with kraken_train.generate or with transformers, or install the "
                "kraken-vllm of a later kraken-train"
            )
        form = ARCHITECTURES[architecture]
        if not form.first_format <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={format_version} in config.json: this kraken-vllm reads versions {form.first_format} "
                f"to {FORMAT_VERSION} of a model with architecture={architecture}; make the export again with the "
                "kraken-train that this plugin came with"
            )
        self.architecture = architecture
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.ffn = ffn
        self.ffn_hidden_size = ffn_hidden_size
        self.ffn_multiplier = kwargs.pop("ffn_multiplier", form.ffn_multiplier)
        self.positions = positions
        self.rope_theta = rope_theta
        self.qk_norm = qk_norm
        self.tie_embeddings = tie_embeddings if tie_word_embeddings is None else tie_word_embeddings
        for name, default in form.further:
            setattr(self, name, kwargs.pop(name, default))
        if form.streams is not None:
            setattr(self, form.streams, kwargs.pop(form.streams, 2))
        setattr(self, form.heads, kwargs.pop(form.heads, 2))
        # A number in any case: vLLM reads `num_kv_heads` first and asks no further.
        setattr(self, form.kv_heads, kwargs.pop(form.kv_heads, None) or getattr(self, form.heads))
        require_known_values(self, head_dim)
        self.head_dim = head_dim or hidden_size // self.heads_per_stream
        self.tie_word_embeddings = self.tie_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.format_version = format_version
        self.overlap = overlap
        super().__init__(**kwargs)

    @property
    def form(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def is_stacked(self) -> bool:
        return self.form.is_stacked

    @property
    def hides_sums(self) -> bool:
        return self.form.hides_sums

    @property
    def streams(self) -> int:
        return 1 if self.form.streams is None else int(getattr(self, self.form.streams))

    @property
    def heads_per_stream(self) -> int:
        return int(getattr(self, self.form.heads))

    @property
    def kv_heads_per_stream(self) -> int:
        return int(getattr(self, self.form.kv_heads))

    @property
    def embedding_width(self) -> int:
        """Of the embeddings, and of what the head reads."""
        return int(getattr(self, "embedding_size", None) or self.hidden_size)

    @property
    def num_attention_heads(self) -> int:
        """Of all streams together."""
        return self.streams * self.heads_per_stream

    @property
    def num_key_value_heads(self) -> int:
        return self.streams * self.kv_heads_per_stream

    @property
    def intermediate_size(self) -> int:
        """Inner width of one stream's FFN."""
        if self.ffn_hidden_size is not None:
            return int(self.ffn_hidden_size)
        width = int(self.ffn_multiplier * self.hidden_size)
        if self.ffn == "gelu":
            return width
        step = 64 if self.is_stacked else math.lcm(64, self.num_attention_heads)
        return max(1, round(2 * width / 3 / step)) * step

    @property
    def kernel_head_dim(self) -> int:
        """The head dimension that the attention computes with: `head_dim`, or more with zeros appended."""
        return next(known for known in KERNEL_HEAD_DIMS if known >= self.head_dim)


def require_known_values(config: KrakenConfig, head_dim: int | None) -> None:
    """Raises ValueError for settings that no export has, as after an edit of config.json by hand."""
    form = config.form
    names = ["num_layers", "hidden_size", "vocab_size", "context_length", form.heads, form.kv_heads]
    names += [] if form.streams is None else [form.streams]
    further = [name for name, default in form.further if default is not False]  # but for switches
    optional = {name: getattr(config, name) for name in ["ffn_hidden_size", *further]} | {"head_dim": head_dim}
    counts = {name: getattr(config, name) for name in names}
    counts |= {name: value for name, value in optional.items() if value is not None}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} in config.json must be a whole number of at least 1")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} in config.json must be {' or '.join(choices)}")
    heads, kv_heads = config.heads_per_stream, config.kv_heads_per_stream
    if heads % kv_heads:
        raise ValueError(f"{form.kv_heads}={kv_heads} in config.json does not divide {form.heads}={heads}")
    if head_dim is None and config.hidden_size % heads:
        raise ValueError(
            f"{form.heads}={heads} in config.json does not divide hidden_size={config.hidden_size}, and there is no "
            "head_dim"
        )


def require_servable(config: Any, size: int, max_model_len: int | None = None) -> None:
    """Raises ValueError unless `size` ranks can serve the model, with sequences of `max_model_len` tokens."""
    if config.head_dim > KERNEL_HEAD_DIMS[-1]:
        raise ValueError(
            f"head_dim={config.head_dim}: vLLM's attention kernels have head dimensions up to {KERNEL_HEAD_DIMS[-1]}; "
            "use python -m kraken_train.generate"
        )
    if max_model_len is not None and max_model_len > config.context_length and config.positions == "learned":
        raise ValueError(
            f"--max-model-len {max_model_len}: the model has learned positions of {config.context_length} tokens "
            f"(context_length) and none beyond; use at most {config.context_length}"
        )
    form = ARCHITECTURES[config.architecture]
    if form.is_stacked:
        require_divides(size, f"{form.streams}={config.streams}", config.streams)
        return
    heads, kv_heads = config.heads_per_stream, config.kv_heads_per_stream
    require_divides(size, f"{form.heads}={heads}", heads)
    require_divides(size, f"the FFN's inner width {config.intermediate_size}", config.intermediate_size)
    if kv_heads % size and size % kv_heads:
        counts = [n for n in range(1, heads + 1) if not heads % n and (not kv_heads % n or not n % kv_heads)]
        raise ValueError(
            f"--tensor-parallel-size {size} neither divides {form.kv_heads}={kv_heads} nor is a multiple of it, so the "
            f"ranks cannot share the key-value heads; use {one_of(counts)}"
        )


def require_divides(size: int, what: str, total: int) -> None:
    if total % size:
        counts = [n for n in range(1, total + 1) if not total % n]
        raise ValueError(
            f"--tensor-parallel-size {size} does not divide {what}, which the ranks share; use {one_of(counts[:8])}"
        )


def one_of(numbers: list[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if len(numbers) > 1 else map(str, numbers))
