"""The authors' weights: names, stacking, and what is wrong with a file that is not theirs."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, rough_model
from torch import Tensor

from checkpoints.exports.reference import SUB_LAYER_NAMES, convert_reference_state_dict
from kraken_train.common.errors import CheckpointError
from kraken_train.model.config import KrakenConfig
from kraken_train.model.kraken import KrakenModel


def as_theirs(weights: dict[str, Tensor], num_sub_layers: int, num_layers: int) -> dict[str, Tensor]:
    """Our weights under the authors' names."""
    theirs = {
        "transformer.wte.weight": weights["token_embedding.weight"],
        "transformer.wpe.weight": weights["position_embedding.weight"],
        "transformer.ln_f.weight": weights["final_norm.weight"],
        "transformer.conjunction.weight": torch.cat(list(weights["conjunction.weight"]), dim=1),
        "lm_head.weight": weights["token_embedding.weight"],
    }
    for layer in range(num_layers):
        for their_name, our_name in SUB_LAYER_NAMES.items():
            for i in range(num_sub_layers):
                theirs[f"transformer.h.{i}.{layer}.{their_name}"] = weights[f"layers.{layer}.{our_name}"][i]
    return theirs


@pytest.fixture
def theirs() -> dict[str, Tensor]:
    config = KrakenConfig(2, 2, 8, 2, 16, 8)
    return as_theirs(rough_model(config).state_dict(), 2, 2)


@pytest.mark.parametrize(("num_sub_layers", "num_layers"), [(1, 1), (2, 5), (6, 2), (12, 11)])
def test_any_size(num_sub_layers: int, num_layers: int) -> None:
    config = KrakenConfig(num_sub_layers, num_layers, 8, 2, 16, 8)
    ours = rough_model(config)
    model = KrakenModel(config).double()
    model.load_state_dict(convert_reference_state_dict(as_theirs(ours.state_dict(), num_sub_layers, num_layers)))
    ids = random_ids(config, 1, 6)
    assert torch.equal(model(ids), ours(ids))


def test_compiled_prefix_and_tied_head(theirs: dict[str, Tensor]) -> None:
    expected = convert_reference_state_dict(theirs)
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in theirs.items()}
    for names_left_out in ([], ["lm_head.weight"], ["transformer.wte.weight"]):
        for weights in (theirs, prefixed):
            chosen = {n: t for n, t in weights.items() if n.removeprefix("_orig_mod.") not in names_left_out}
            converted = convert_reference_state_dict(chosen)
            assert converted.keys() == expected.keys()
            assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_causal_masks_are_left_out(theirs: dict[str, Tensor]) -> None:
    expected = convert_reference_state_dict(theirs)
    masks = {f"transformer.h.{i}.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in (0, 1) for layer in (0, 1)}
    masks["transformer.h.0.0.attn.masked_bias"] = torch.tensor(-1e4)
    converted = convert_reference_state_dict({**theirs, **masks})
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.conjunction.weight",
        "transformer.h.1.0.mlp.c_fc.weight",
        "transformer.h.0.1.ln_1.weight",
    ],
)
def test_a_missing_weight(theirs: dict[str, Tensor], name: str) -> None:
    del theirs[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        convert_reference_state_dict(theirs)


def test_what_does_not_belong(theirs: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="not a weight of the authors' Kraken: other"):
        convert_reference_state_dict({**theirs, "other": torch.zeros(1)})
    for bias in ("ln_1.bias", "attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias"):
        with pytest.raises(CheckpointError, match="biases are not supported"):
            convert_reference_state_dict({**theirs, f"transformer.h.0.0.{bias}": torch.zeros(8)})
    with pytest.raises(CheckpointError, match="tied"):
        convert_reference_state_dict({**theirs, "lm_head.weight": torch.zeros(16, 8)})
    with pytest.raises(CheckpointError, match="differ in shape"):
        convert_reference_state_dict({**theirs, "transformer.h.0.0.ln_1.weight": torch.zeros(9)})
    with pytest.raises(CheckpointError, match="does not fit 2 sub-layers"):
        convert_reference_state_dict({**theirs, "transformer.conjunction.weight": torch.zeros(8, 24)})
    without_head = {n: t for n, t in theirs.items() if n not in ("lm_head.weight", "transformer.wte.weight")}
    with pytest.raises(CheckpointError, match="is missing"):
        convert_reference_state_dict(without_head)
