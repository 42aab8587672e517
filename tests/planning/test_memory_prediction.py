"""The trace with fake tensors against autograd on real tensors, and what must follow from how memory is shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import random_ids, small_configs
from torch import Tensor

from kraken_train.model.config import KrakenConfig
from kraken_train.model.registry import build_model
from kraken_train.model.rotary import rotary_angles
from kraken_train.planning.fake_trace import drop_gradient, trace_all_layers, trace_micro_batch
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import predict_memory, shards

ALONE = TrainingLayout(1, 1, micro_batch_size=2, accumulation_steps=1, precision="fp32")
KRAKEN = KrakenConfig(4, num_layers=8, hidden_size=64, heads_per_sub_layer=2, vocab_size=512, context_length=64)


def saved_bytes(name: str, recompute: bool) -> int:
    """What autograd keeps of the layers, by its own account."""
    config = small_configs()[name]
    model = build_model(config)
    model.recompute = recompute
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept.setdefault(place, tensor)
        return tensor

    ids = random_ids(config, 2, config.context_length)
    rotary, positions = None, torch.arange(ids.shape[1])
    embedding = model.token_embedding(ids)
    if model.position_embedding is None:
        rotary = rotary_angles(positions, config.head_size, config.rope_theta, embedding.dtype)
    else:
        embedding = embedding + model.position_embedding(positions)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(embedding, rotary, [None] * config.num_layers)
    for tensor in (hidden, embedding):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", ["kraken", "standard", "parallel", "kraken-gqa", "kraken-modern", "standard-modern"])
@pytest.mark.parametrize("recompute", [False, True])
def test_kept_activations(name: str, recompute: bool) -> None:
    config = small_configs()[name]
    traced = trace_micro_batch(config, replace(ALONE, activation_checkpointing=recompute)).kept
    if not recompute:
        assert traced == pytest.approx(saved_bytes(name, recompute), rel=0.05)
    else:  # what checkpoints keep is not autograd's to tell: less than half of what it keeps without them
        assert traced < 0.5 * trace_micro_batch(config, ALONE).kept


def test_depth_is_continued_exactly() -> None:
    """Eight layers at once against three and four layers and a line through them."""
    for layout in (replace(ALONE, zero_stage=2), replace(ALONE, zero_stage=2, activation_checkpointing=True)):
        whole = trace_all_layers(KRAKEN, replace(layout, zero_stage=1), drop_gradient)
        assert trace_micro_batch(KRAKEN, layout) == whole


def test_shares() -> None:
    def memory(**changes: object):  # type: ignore[no-untyped-def]
        return predict_memory(KRAKEN, replace(ALONE, precision="bf16", accumulation_steps=2, **changes))

    one = memory()
    elements = shards(KRAKEN, ALONE).elements
    assert elements == KRAKEN.num_parameters
    # bf16 weights, fp32 masters and two moments, fp32 gradients (padding aside).
    assert one.weights == pytest.approx(2 * elements, rel=1e-3)
    assert one.optimizer == pytest.approx(12 * elements, rel=1e-3)
    assert one.gradients == pytest.approx(4 * elements, rel=1e-3)
    four = memory(data_parallel_size=4)
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-2)
    assert four.weights == pytest.approx(one.weights)
    assert memory(data_parallel_size=4, zero_stage=2).gradients == pytest.approx(one.gradients / 4, rel=1e-2)
    shared = KRAKEN.hidden_size * (KRAKEN.vocab_size + KRAKEN.context_length + 1)
    share = memory(sub_layer_parallel_size=4)
    assert share.weights == pytest.approx(2 * (shared + (elements - shared) / 4), rel=1e-2)
    assert share.activations < 0.5 * one.activations
    assert memory(activation_checkpointing=True).activations < 0.5 * one.activations
    assert memory(micro_batch_size=8).activations == pytest.approx(4 * one.activations, rel=0.05)


def test_bf16_gradients_of_an_only_micro_batch() -> None:
    """They are all there when BF16_Optimizer adds them to its sums; of several micro-batches each goes as it comes."""
    short = replace(KRAKEN, context_length=4)
    several = replace(ALONE, precision="bf16", micro_batch_size=1, accumulation_steps=2)
    once = predict_memory(short, replace(several, accumulation_steps=1))
    assert once.moment == "sum of the gradients in fp32"
    qkv = 4 * 3 * KRAKEN.hidden_size**2  # elements of the largest parameter
    assert once.working == 2 * shards(short, several).elements + 4 * qkv
    assert predict_memory(short, several).total < once.total
