"""What an architecture declares about itself: its settings, its sizes, and what its layers compute and communicate.

Planning, benchmarks, inference, exports and reports read these declarations and never ask which architecture a model
has. `kraken_train.model.registry` lists the architectures. This file and the configurations import no PyTorch.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_choice, require_divides, require_positive
from kraken_train.model.layer_settings import LayerSettings

LARGEST_SIZE = 2**31 - 1
ATTENTION, FFN = "attention", "ffn"  # names of the parts of a layer
Config = TypeVar("Config", bound="ModelConfig")


@dataclass(frozen=True)
class Matrix:
    """`count` weights of (out_features, in_features) side by side; every token is multiplied with each of them."""

    in_features: int
    out_features: int
    count: int = 1

    @property
    def parameters(self) -> int:
        return self.count * self.in_features * self.out_features


@dataclass(frozen=True)
class Passes:
    """How often the element-wise operations of a compiled layer read or write (tokens, width) values in memory."""

    forward: int
    backward: int


NORM = Passes(2, 5)  # x in, normed out; its gradient, x and what has been added up in, gradient out and added
JOIN_HEADS = Passes(2, 2)
READ_STREAM = Passes(1, 1)  # by the norm before an FFN, and its gradient
RESIDUAL = Passes(4, 3)  # of Kraken: streams, attended and FFN in, streams out
ADD = Passes(2, 2)  # of the baselines, whose norm makes the sum
GELU = Passes(2, 3)
SWIGLU = Passes(3, 5)  # gate and up in, their product out; its gradient and both in, two gradients out
ROTATE = Passes(2, 2)  # queries and keys
QK_NORM = Passes(2, 3)  # fused with the rotation, if there is one
SUM_OF_STREAMS = Passes(1, 1)


@dataclass(frozen=True)
class LayerPart:
    """A part of a layer on one rank: its products with weights, and its element-wise operations with their widths."""

    matrices: tuple[Matrix, ...]
    element_wise: tuple[tuple[Passes, float], ...]


@dataclass(frozen=True)
class AllReduces:
    """All-reduces of (batch, tokens, width) among the ranks of a model copy, in each micro-batch.

    Half of the `count` belong to the forward pass and half to the backward pass. `behind` names the part of the layer
    that is computed meanwhile; None: the ranks wait.
    """

    purpose: str
    count: int
    width: int
    behind: str | None = None


class ModelConfig(LayerSettings, ABC):
    """The settings of a model; a subclass is a frozen dataclass with the settings below, `LayerSettings` and its own.

    The names of the settings for heads and key-value heads are the subclass's choice (`heads_setting`,
    `kv_heads_setting`); the second may be None, which stands for as many as there are heads.
    """

    architecture: str
    num_layers: int
    hidden_size: int  # D, width of a residual stream
    vocab_size: int  # rows of the embedding; at least the tokenizer's size
    context_length: int  # tokens
    ffn_multiplier: int  # width of an FFN in units of hidden_size
    norm_epsilon: float

    architectures: ClassVar[tuple[str, ...]]  # values of `architecture` that the class takes
    model_class: ClassVar[str]  # dotted name of the `LanguageModel`; a string, since that imports PyTorch
    heads_setting: ClassVar[str]
    kv_heads_setting: ClassVar[str]
    # The setting that says for how many devices a model is made; None: for any number that divides its units.
    units_setting: ClassVar[str | None] = None
    has_mup_rules: ClassVar[bool] = True  # whether `recipe.parametrization` knows how its sizes scale
    is_baseline: ClassVar[bool] = False  # whether `kraken_train.derive` takes it as a base
    # The first format_version of exports in which the weights are laid out as they are now.
    first_export_format: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError if a setting breaks a rule."""
        require_choice("model.architecture", self.architecture, self.architectures)
        self.validate_layers()
        shared = {field.name for field in dataclasses.fields(LayerSettings)}
        optional = {name for name, default in self.defaults().items() if default is None}
        switches = {name for name, default in self.defaults().items() if isinstance(default, bool)}
        for name in self.setting_names():
            value = getattr(self, name)
            if name in {"architecture", self.kv_heads_setting, *shared, *switches}:
                continue
            if value is None and name in optional:
                continue
            require_positive(f"model.{name}", value)
            if value > LARGEST_SIZE:
                raise ConfigError(f"model.{name}={value} must be at most {LARGEST_SIZE}")
        heads = f"model.{self.heads_setting}"
        if self.head_dim is None:
            require_divides(heads, self.heads, "model.hidden_size", self.hidden_size)
            self.require_even_heads(self.head_size, f"model.hidden_size={self.hidden_size} with {heads}={self.heads}")
        else:
            self.require_even_heads(self.head_dim, f"model.head_dim={self.head_dim}")
        kv_heads = getattr(self, self.kv_heads_setting)
        if kv_heads is not None:  # each serves the same number of heads
            require_positive(f"model.{self.kv_heads_setting}", kv_heads)
            require_divides(f"model.{self.kv_heads_setting}", kv_heads, f"model.{self.heads_setting}", self.heads)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that have a default, with it."""
        fields = dataclasses.fields(cast(Any, cls))
        return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cast(Any, cls)))

    # Changed copies

    def replace(self: Config, **settings: Any) -> Config:
        """The same model with other settings. Raises ConfigError."""
        return cast(Config, dataclasses.replace(cast(Any, self), **settings))

    def at_depth(self: Config, num_layers: int) -> Config:
        """A model of so many of these layers, to measure what a layer takes."""
        return self.replace(num_layers=num_layers)

    def with_heads(self: Config, hidden_size: int, heads: int) -> Config:
        return self.replace(**{"hidden_size": hidden_size, self.heads_setting: heads})

    def with_kv_heads(self: Config, kv_heads: int) -> Config:
        return self.replace(**{self.kv_heads_setting: kv_heads})

    @classmethod
    def sized(
        cls: type[Config],
        architecture: str,
        *,
        devices: int,
        num_layers: int,
        hidden_size: int,
        heads: int,
        vocab_size: int,
        context_length: int,
    ) -> Config:
        """A model of these sizes, made for `devices` devices where it is made for a number of them."""
        settings: dict[str, Any] = {
            "architecture": architecture,
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            cls.heads_setting: heads,
            "vocab_size": vocab_size,
            "context_length": context_length,
        }
        if cls.units_setting is not None:
            settings[cls.units_setting] = devices
        return cls(**settings)

    # Sizes

    @property
    def layer_period(self) -> int:
        """Layers after which what they compute and communicate repeats."""
        return 1

    @property
    def num_streams(self) -> int:
        """Residual streams side by side, each with an attention and an FFN of its own in every layer."""
        return 1

    @property
    def heads(self) -> int:
        """Heads of a layer and stream."""
        return cast(int, getattr(self, self.heads_setting))

    @property
    def kv_heads(self) -> int:
        """Key-value heads of a layer and stream."""
        return cast(int, getattr(self, self.kv_heads_setting) or self.heads)

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.heads

    @property
    def query_size(self) -> int:
        """Width of the queries of a layer and stream."""
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of the keys of a layer and stream, and of its values."""
        return self.kv_heads * self.head_size

    @property
    def ffn_size(self) -> int:
        """Inner width of an FFN."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        width = self.ffn_multiplier * self.hidden_size
        return width if self.ffn == "gelu" else nearest_multiple(2 * width / 3, self.swiglu_step)

    @property
    def swiglu_step(self) -> int:
        """What a width that is derived for SwiGLU is a multiple of."""
        return 64

    @property
    def embedding_width(self) -> int:
        """Width of the embedding, and of what the head reads."""
        return self.hidden_size

    @property
    def attention_width(self) -> int:
        """Width of all heads of a layer together: the cost of attention is proportional to it."""
        return self.num_streams * self.query_size

    @property
    def cache_width(self) -> int:
        """Values that the key-value cache holds per layer and token."""
        return 2 * self.num_streams * self.kv_size

    @property
    def num_parameters(self) -> int:
        """All weights: matrices with the head, embeddings and norms."""
        embeddings = 0 if self.tie_embeddings else self.vocab_size * self.embedding_width
        if self.positions == "learned":
            embeddings += self.context_length * self.embedding_width
        return self.matrix_parameters + embeddings + self.norm_parameters

    @property
    def norm_parameters(self) -> int:
        """Weights of all norms."""
        qk_norms = 2 * self.num_layers * self.num_streams * self.head_size if self.qk_norm else 0
        return (self.hidden_norms - 1) * self.hidden_size + self.embedding_width + qk_norms

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: the layers' matrices and the head."""
        layer = sum(matrix.parameters for part in self.layer_parts(1).values() for matrix in part.matrices)
        once = sum(matrix.parameters for matrix in (*self.first_matrices(1), *self.last_matrices(1)))
        return self.num_layers * layer + once + self.vocab_size * self.embedding_width

    # Declarations

    @property
    @abstractmethod
    def hidden_norms(self) -> int:
        """Norms in the whole model but those of queries and keys. The one before the head is counted too."""

    @property
    @abstractmethod
    def parallel_units(self) -> tuple[str, int]:
        """What the ranks of a model copy share: the setting that counts the units, and their number."""

    @abstractmethod
    def layer_parts(self, ranks: int) -> dict[str, LayerPart]:
        """The parts of a layer on one of `ranks` ranks that share it evenly, in the order of their computation.

        `ATTENTION` must be one of them; its scores are not listed, they follow from `attention_width`.
        """

    def attention_matrices(self, streams: int, ranks: int) -> tuple[Matrix, ...]:
        """Queries, keys and values, and the way out, of so many streams whose heads `ranks` ranks share."""
        d, heads = self.hidden_size, self.query_size // ranks
        return Matrix(d, heads + 2 * self.kv_size // ranks, streams), Matrix(heads, d, streams)

    def ffn_matrices(self, streams: int, ranks: int) -> tuple[Matrix, ...]:
        """Of the FFNs of so many streams whose inner width `ranks` ranks share."""
        d, inner = self.hidden_size, self.ffn_size // ranks
        into = Matrix(d, inner, streams)
        return (*((into,) if self.ffn == "gelu" else (into, into)), Matrix(inner, d, streams))

    def attention_passes(self, streams: int, ranks: int) -> tuple[tuple[Passes, float], ...]:
        """Element-wise operations between the products of the attention, with their widths."""
        query_and_key = streams * (self.query_size + self.kv_size) / ranks
        passes: tuple[tuple[Passes, float], ...] = ((JOIN_HEADS, streams * self.query_size / ranks),)
        if self.qk_norm:
            passes += ((QK_NORM, query_and_key),)
        elif self.positions == "rope":
            passes += ((ROTATE, query_and_key),)
        return passes

    def ffn_passes(self, streams: int, ranks: int) -> tuple[tuple[Passes, float], ...]:
        """Element-wise operations between the products of the FFN, with their widths."""
        return ((GELU if self.ffn == "gelu" else SWIGLU, streams * self.ffn_size / ranks),)

    def first_matrices(self, ranks: int) -> tuple[Matrix, ...]:
        """What there is once on one of `ranks` ranks, between the embedding and the layers."""
        return ()

    def last_matrices(self, ranks: int) -> tuple[Matrix, ...]:
        """What there is once on one of `ranks` ranks, between the layers and the head."""
        return ()

    @property
    @abstractmethod
    def all_reduces(self) -> tuple[AllReduces, ...]:
        """Those of the layers and of what is between them and the head; not those of a sharded vocabulary."""

    @property
    def copied_gains(self) -> int:
        """Numbers whose gradients take a further all-reduce in each micro-batch: gains that each rank copies."""
        return 0

    @property
    def overlaps_communication(self) -> bool:
        """Whether anything is computed while an all-reduce is under way."""
        return any(all_reduces.behind is not None for all_reduces in self.all_reduces)

    def serving_units(self, devices: int) -> tuple[str, int]:
        """Like `parallel_units`, for inference on `devices` devices, which may be more than there are units."""
        return self.parallel_units

    def served_with(self: Config, units: int) -> Config:
        """The model as it is served where `serving_units` says so many units. Raises ValueError."""
        name, own = self.parallel_units
        if units != own:
            raise ValueError(f"{name}={own} cannot be served as {units} units")
        return self

    # For people

    @property
    @abstractmethod
    def title(self) -> str:
        """The architecture in tables, such as "4-way Kraken"."""

    @property
    @abstractmethod
    def color(self) -> str:
        """The architecture's colour in figures, #rrggbb."""

    @property
    @abstractmethod
    def introduction(self) -> str:
        """The first sentence of a model card, in Markdown."""


def nearest_multiple(value: float, step: int) -> int:
    """The multiple of `step` that is nearest to `value`, at least one `step`."""
    return max(1, round(value / step)) * step
