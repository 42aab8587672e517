"""Converts the authors' weights (a nanoGPT fork) to our names and our stacked layout.

Theirs: `transformer.h.{sub_layer}.{layer}.attn.c_attn.weight` and so on, each (out, in); one conjunction of shape
(D, N D). Ours: `layers.{layer}.attention.qkv.weight` of shape (N, 3D, D); a conjunction of shape (N, D, D).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from kraken_train.common.errors import CheckpointError

COMPILE_PREFIX = "_orig_mod."
SUB_LAYER_WEIGHT = re.compile(r"transformer\.h\.(\d+)\.(\d+)\.(.+)")
SUB_LAYER_NAMES = {
    "ln_1.weight": "attention.norm.weight",
    "attn.c_attn.weight": "attention.qkv.weight",
    "attn.c_proj.weight": "attention.out.weight",
    "ln_2.weight": "ffn.norm.weight",
    "mlp.c_fc.weight": "ffn.up.weight",
    "mlp.c_proj.weight": "ffn.down.weight",
}
CAUSAL_MASKS = ("attn.bias", "attn.masked_bias")  # buffers of their attention under an old PyTorch, no weights
SHARED_NAMES = {
    "transformer.wpe.weight": "position_embedding.weight",
    "transformer.ln_f.weight": "final_norm.weight",
}
TIED_NAMES = ("transformer.wte.weight", "lm_head.weight")
CONJUNCTION_NAME = "transformer.conjunction.weight"


def convert_reference_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict, of any N and depth, as one of `KrakenModel`.

    Takes keys with or without torch.compile's `_orig_mod.` prefix, and the tied embedding under either or both of
    its names; leaves out causal masks. Raises CheckpointError for keys that are unknown, missing or contradict each
    other.
    """
    weights = {name.removeprefix(COMPILE_PREFIX): tensor for name, tensor in state_dict.items()}
    converted = {"token_embedding.weight": take_tied_embedding(weights)}
    for theirs, ours in SHARED_NAMES.items():
        converted[ours] = take(weights, theirs)
    conjunction = take(weights, CONJUNCTION_NAME)

    stacks: dict[str, dict[int, Tensor]] = {}  # our name -> sub-layer -> weight
    num_sub_layers = num_layers = 0
    for name in list(weights):
        match = SUB_LAYER_WEIGHT.fullmatch(name)
        if match is not None and match[3] in CAUSAL_MASKS:
            del weights[name]
        if match is None or match[3] not in SUB_LAYER_NAMES:
            continue
        sub_layer, layer = int(match[1]), int(match[2])
        stacks.setdefault(f"layers.{layer}.{SUB_LAYER_NAMES[match[3]]}", {})[sub_layer] = weights.pop(name)
        num_sub_layers, num_layers = max(num_sub_layers, sub_layer + 1), max(num_layers, layer + 1)
    if weights:
        hint = "; models with biases are not supported" if any(n.endswith(".bias") for n in weights) else ""
        raise CheckpointError(f"not a weight of the authors' Kraken: {sorted(weights)[0]}{hint}")
    for layer in range(num_layers):
        for theirs, ours in SUB_LAYER_NAMES.items():
            stack = stacks.get(f"layers.{layer}.{ours}", {})
            for sub_layer in range(num_sub_layers):
                if sub_layer not in stack:
                    raise CheckpointError(f"the weight transformer.h.{sub_layer}.{layer}.{theirs} is missing")
            try:
                converted[f"layers.{layer}.{ours}"] = torch.stack([stack[i] for i in range(num_sub_layers)])
            except RuntimeError as error:
                raise CheckpointError(f"the sub-layers' {theirs} of layer {layer} differ in shape") from error

    width = conjunction.shape[0]
    if not num_sub_layers or conjunction.shape != (width, num_sub_layers * width):
        raise CheckpointError(
            f"{CONJUNCTION_NAME} has shape {tuple(conjunction.shape)}, which does not fit {num_sub_layers} sub-layers"
        )
    # Column block i of their (D, N D) multiplies sub-layer i.
    converted["conjunction.weight"] = conjunction.view(width, num_sub_layers, width).transpose(0, 1).contiguous()
    return converted


def take_tied_embedding(weights: dict[str, Tensor]) -> Tensor:
    found = [weights.pop(name) for name in TIED_NAMES if name in weights]
    if not found:
        raise CheckpointError(f"the weight {' or '.join(TIED_NAMES)} is missing")
    if len(found) == 2 and not torch.equal(found[0], found[1]):
        raise CheckpointError(f"{' and '.join(TIED_NAMES)} differ, but a Kraken's head is tied to its embedding")
    return found[0]


def take(weights: dict[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise CheckpointError(f"the weight {name} is missing")
    return weights.pop(name)
