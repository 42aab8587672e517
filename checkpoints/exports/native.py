"""Standard Transformers as folders of Llama and Qwen3, which transformers and servers know without code of ours.

These are the standard architecture with RMSNorm, SwiGLU and rotary embeddings: Llama, or Qwen3 with norms of queries
and keys. The weights are the same numbers under other names; queries, keys and values are one matrix here and three
there. Written and read here, for `checkpoints.export format=native` and `checkpoints.import_transformers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.settings import from_dict
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.gpt_config import GPTConfig

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # by model_type
REQUIRED = {"architecture": "standard", "norm": "rmsnorm", "ffn": "swiglu", "positions": "rope"}
SETTINGS = {  # ours -> theirs, where the values are the same
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # of theirs
ONCE = {
    "token_embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_LAYERS = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
QK_NORMS = ("attention.q_norm.weight", "attention.k_norm.weight")
QKV = "attention.qkv.weight"
PROJECTIONS = [f"self_attn.{name}_proj.weight" for name in "qkv"]


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def require_native(config: ModelConfig) -> GPTConfig:
    """Raises CheckpointError for a model that is neither a Llama nor a Qwen3."""
    for name, needed in REQUIRED.items():
        found = getattr(config, name)
        if found != needed:
            raise CheckpointError(
                f"format=native writes a Llama or a Qwen3, which have model.{name}={needed}, and this model has "
                f"model.{name}={found}; use format=kraken, which transformers reads with trust_remote_code=True"
            )
    assert isinstance(config, GPTConfig)
    if not config.qk_norm and config.hidden_size % config.heads:
        raise CheckpointError(
            f"format=native: transformers' Llama has no model.hidden_size={config.hidden_size} that "
            f"model.num_heads={config.heads} does not divide; use format=kraken"
        )
    return config


def native_description(config: GPTConfig, special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, without the dtype. `special_tokens` are ids by their names in it."""
    model_type = "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "attention_bias": False,
        # The second is its name since transformers 5.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **{f"{name}_token_id": special_tokens.get(f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }


def to_native(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names."""
    renamed = {theirs: weights[ours] for ours, theirs in ONCE.items() if ours in weights}
    queries = config.heads // config.kv_heads * config.head_size  # rows of a group that are queries
    for layer in range(config.num_layers):
        mine, prefix = f"layers.{layer}", f"model.layers.{layer}"
        for ours, theirs in IN_LAYERS.items():
            if f"{mine}.{ours}" in weights:
                renamed[f"{prefix}.{theirs}"] = weights[f"{mine}.{ours}"]
        parts = weights[f"{mine}.{QKV}"].split((queries, config.head_size, config.head_size), dim=1)
        for name, part in zip(PROJECTIONS, parts, strict=True):
            renamed[f"{prefix}.{name}"] = part.flatten(0, 1)
    return renamed


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


def is_native(description: Mapping[str, Any]) -> bool:
    model_type = description.get("model_type")
    return isinstance(model_type, str) and model_type in CLASSES


def native_config(description: Mapping[str, Any], path: Path) -> GPTConfig:
    """The settings of the model that `path`, a config.json, describes. Raises CheckpointError."""
    rope, scaling = (description.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise CheckpointError(f"{path} does not describe a model: rope_parameters and rope_scaling must be mappings")
    for name, value, needed in (
        ("hidden_act", description.get("hidden_act", "silu"), "silu"),
        ("attention_bias", description.get("attention_bias", False), False),
        ("mlp_bias", description.get("mlp_bias", False), False),
        ("use_sliding_window", description.get("use_sliding_window", False), False),
        ("rope_type", scaling.get("rope_type", scaling) if scaling else rope.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
    ):
        if value != needed:
            raise CheckpointError(f"{path} has {name}={value}, and models of this program have {needed} only")
    known = {**DEFAULTS, **description}
    settings: dict[str, Any] = {
        **{ours: known.get(theirs) for ours, theirs in SETTINGS.items()},
        **REQUIRED,
        "head_dim": description.get("head_dim"),
        "ffn_hidden_size": description.get("intermediate_size"),
        "rope_theta": rope.get("rope_theta", description.get("rope_theta", 10000.0)),
        "qk_norm": description["model_type"] == "qwen3",
    }
    try:
        if settings["ffn_hidden_size"] is None:
            raise ConfigError("it has no intermediate_size")
        config = from_dict(settings, GPTConfig, "model")
        fits = config.hidden_size % config.num_heads == 0
        return (
            config.replace(head_dim=None)
            if fits and config.head_dim == config.hidden_size // config.num_heads
            else config
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a model: {error}") from error


def from_native(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Their weights under our names. Raises CheckpointError where one is missing, unknown or of another shape."""
    known = {*ONCE.values(), *IN_LAYERS.values(), *PROJECTIONS}
    for name in weights:
        if re.sub(r"^model\.layers\.\d+\.", "", name) not in known and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{folder} has the weight {name}, which models of this program do not have")
    try:
        renamed = {ours: weights[theirs] for ours, theirs in ONCE.items() if ours != "lm_head.weight"}
        if not config.tie_embeddings:
            renamed["lm_head.weight"] = weights["lm_head.weight"]
        for layer in range(config.num_layers):
            mine, prefix = f"layers.{layer}", f"model.layers.{layer}"
            for ours, theirs in IN_LAYERS.items():
                if config.qk_norm or ours not in QK_NORMS:
                    renamed[f"{mine}.{ours}"] = weights[f"{prefix}.{theirs}"]
            parts = [weights[f"{prefix}.{name}"].unflatten(0, (config.kv_heads, -1)) for name in PROJECTIONS]
            renamed[f"{mine}.{QKV}"] = torch.cat(parts, dim=1)
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks the weight {error.args[0]}; save the model again") from error
    except (RuntimeError, IndexError) as error:  # of `unflatten` and `cat`
        raise CheckpointError(
            f"the weights in {folder} have other shapes than its config.json says ({str(error).splitlines()[0]}); save "
            "the model again"
        ) from error
    return renamed
