"""The vLLM plugin's layers and weights on 1 to 6 ranks, without vLLM, against the model that was exported."""

from __future__ import annotations

import pytest
import torch
from helpers import MODERN, random_ids, rough_model, shareable_configs, small_configs
from kraken_vllm.decoder import LAYERS
from plugin_ranks import hidden_on_ranks, plugin_config

from checkpoints.exports import modeling_kraken
from checkpoints.exports.folder import describe
from kraken_train.model.config import GPTConfig, KrakenConfig

COMMON = {"vocab_size": 96, "context_length": 24, "num_layers": 3}
CONFIGS = {
    **{name: config for name, config in small_configs().items() if config.architecture in LAYERS},
    **{f"shareable-{name}": of for name, of in shareable_configs().items() if of.architecture in LAYERS},
    "odd-heads": KrakenConfig(2, hidden_size=15, heads_per_sub_layer=3, **COMMON),
    "kernel-heads": KrakenConfig(2, hidden_size=64, heads_per_sub_layer=2, **COMMON, **MODERN),
    "wide-heads": GPTConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=40, **COMMON, **MODERN),
    "more-ranks-than-kv-heads": GPTConfig(hidden_size=48, num_heads=8, num_kv_heads=2, **COMMON, **MODERN),
    "multi-query": GPTConfig(hidden_size=32, num_heads=4, num_kv_heads=1, architecture="parallel", **COMMON),
}
SIZES = {
    "kraken": (1, 3), "kraken-gqa": (1, 3), "kraken-mqa": (3,), "kraken-modern": (1, 3),
    "standard": (1, 3), "standard-gqa": (1, 3), "standard-modern": (1, 3),
    "parallel": (1, 3), "parallel-mqa": (1, 3), "parallel-modern": (3,),
    "shareable-kraken-4": (2, 4), "shareable-kraken-6": (2, 6), "shareable-kraken-modern": (2, 4),
    "track": (1, 3), "track-modern": (1, 3), "ladder": (1, 3), "ladder-modern": (1, 3), "fal": (1, 3),
    "fal-modern": (1, 3), "shareable-track": (2, 4), "shareable-track-modern": (4,), "shareable-ladder": (2, 4),
    "shareable-ladder-modern": (2, 4), "shareable-fal": (2, 4), "shareable-fal-modern": (2, 4),
    "shareable-standard": (2, 4), "shareable-parallel": (2, 4), "shareable-standard-modern": (2, 4),
    "odd-heads": (1, 2), "kernel-heads": (1, 2), "wide-heads": (1, 2, 4),
    "more-ranks-than-kv-heads": (2, 4, 8), "multi-query": (1, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in CONFIGS for size in SIZES.get(name, (1,))])
def test_all_ranks_compute_what_the_exported_model_does(name: str, size: int) -> None:
    config = CONFIGS[name]
    model = rough_model(config)
    ids = random_ids(config, 1, 11)
    with torch.no_grad():
        expected = model(ids)[0]
    found, _ = hidden_on_ranks(config, model.state_dict(), ids[0], size)
    if size > 1:
        waiting, _ = hidden_on_ranks(config, model.state_dict(), ids[0], size, overlap=False)
        torch.testing.assert_close(waiting, found, rtol=0, atol=0)
    for hidden in found:
        torch.testing.assert_close(hidden @ model.head.weight.detach().t(), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("name", "size"), [("shareable-kraken-modern", 2), ("kraken", 1), ("standard-modern", 3)])
def test_products_one_by_one_are_those_of_the_stack(name: str, size: int) -> None:
    """As with quantized weights."""
    config = CONFIGS[name]
    weights, ids = rough_model(config).state_dict(), random_ids(config, 1, 11)[0]
    together, _ = hidden_on_ranks(config, weights, ids, size)
    one_by_one, _ = hidden_on_ranks(config, weights, ids, size, is_quantized=True)
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-12)


HIDDEN = ["start_sum", "attention", "add_sum"]
BEHIND_FFN = ["start_sum", "add_sum"]  # the FFN is no event
EVENTS = {  # of three layers
    "shareable-kraken-4": ["attention", *HIDDEN, *HIDDEN, "all_reduce"],
    "shareable-ladder": ["attention", *BEHIND_FFN, *[*HIDDEN, *BEHIND_FFN] * 2, "all_reduce"],
    # The first layer is a standard one.
    "shareable-ladder-modern": ["attention", "all_reduce", *[*HIDDEN, *BEHIND_FFN] * 2, "all_reduce"],
    "shareable-standard": ["attention", "all_reduce", "all_reduce"] * 3,
    "shareable-parallel": ["attention", "all_reduce"] * 3,
    "shareable-track": ["attention", "attention", "all_reduce", "attention", "all_reduce"],  # one for two layers
    "shareable-fal": ["attention", "all_reduce", "all_reduce", *["attention", "all_reduce"] * 2],
}


@pytest.mark.parametrize("name", EVENTS)
def test_sums_are_under_way_while_a_layer_computes(name: str) -> None:
    config = CONFIGS[name]
    weights, ids = rough_model(config).state_dict(), random_ids(config, 1, 5)[0]
    assert hidden_on_ranks(config, weights, ids, 2)[1] == [EVENTS[name]] * 2
    waiting = [("all_reduce" if event == "start_sum" else event) for event in EVENTS[name] if event != "add_sum"]
    assert hidden_on_ranks(config, weights, ids, 2, overlap=False)[1] == [waiting] * 2
    assert plugin_config(config).hides_sums == ("start_sum" in EVENTS[name])
    assert "start_sum" not in hidden_on_ranks(config, weights, ids, 1)[1][0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_that_of_the_export(name: str) -> None:
    config = CONFIGS[name]
    description = describe(config, {}, torch.float32)
    ours, theirs = plugin_config(config), modeling_kraken.KrakenConfig(**description)
    names = {key for key in theirs.to_dict() if key not in {"transformers_version", "use_cache"}}
    assert {key: getattr(ours, key) for key in names} == {key: getattr(theirs, key) for key in names}
    for key in ("is_stacked", "streams", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.num_attention_heads == config.num_streams * config.heads
    assert ours.intermediate_size == config.ffn_size
    assert (ours.num_hidden_layers, ours.max_position_embeddings) == (config.num_layers, config.context_length)


def test_weights_that_do_not_fit_are_named() -> None:
    config = CONFIGS["kraken"]
    weights, ids = rough_model(config).state_dict(), random_ids(config, 1, 5)[0]
    name = "layers.1.ffn.up.weight"
    for changed, message in (
        ({**weights, "layers.7.ffn.up.weight": weights[name]}, r"layers\.7\.ffn\.up\.weight, which .* not describe"),
        ({**weights, name: weights[name][:, 1:]}, r"layers\.1\.ffn\.up\.weight in the file does not fit config\.json"),
        ({key: value for key, value in weights.items() if key != name}, r"lacks the weight layers\.1\.ffn\.up\.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            hidden_on_ranks(config, changed, ids, 1)
