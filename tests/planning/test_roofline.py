"""Predicted times: work that is counted another way, what must hide, and the order of measured steps."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from helpers import random_ids
from torch.utils.flop_counter import FlopCounterMode

from kraken_train.model.config import GPTConfig, KrakenConfig
from kraken_train.model.cross_entropy import LOGITS_AT_ONCE
from kraken_train.model.flops import matrix_flops_per_token
from kraken_train.model.registry import build_model
from kraken_train.planning import cluster
from kraken_train.planning.cluster import Cluster, load_cluster
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.prediction import predict
from kraken_train.planning.roofline import alignment, predict_time, products
from kraken_train.planning.traffic import predict_traffic

H100 = load_cluster("dgx_h100")
KRAKEN = KrakenConfig(4, num_layers=12, hidden_size=512, heads_per_sub_layer=4, vocab_size=50304, context_length=1024)
WIDE = replace(KRAKEN, embedding_size=768)
GPT = GPTConfig(num_layers=12, hidden_size=768, num_heads=12, vocab_size=50304, context_length=1024)
ALONE = TrainingLayout(1, 1, micro_batch_size=20, accumulation_steps=1)
# Tokens per second of one H100, micro-batches of 20 x 1024, bf16, compiled, plain PyTorch.
MEASURED = {
    "kraken-512": (KRAKEN, 369e3),
    "gpt2": (GPT, 522e3),
    "kraken-504": (replace(KRAKEN, hidden_size=504, heads_per_sub_layer=3), 308e3),
    "kraken-2-of-640": (replace(KRAKEN, num_sub_layers=2, hidden_size=640, heads_per_sub_layer=5), 488e3),
    "kraken-2-of-678": (replace(KRAKEN, num_sub_layers=2, hidden_size=678, heads_per_sub_layer=6), 249e3),
}


@pytest.mark.parametrize("config", [KRAKEN, WIDE, GPT])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_products_are_all_matrix_parameters(config: KrakenConfig | GPTConfig, size: int) -> None:
    layout = replace(ALONE, sub_layer_parallel_size=size, vocab_parallel=size > 1)
    parts, once = products(config, layout)
    flops = config.num_layers * sum(p.flops for part in parts.values() for p in part) + sum(p.flops for p in once)
    assert 3 * size * flops == pytest.approx(matrix_flops_per_token(config) * 20 * 1024, rel=1e-12)


@pytest.mark.parametrize("name", MEASURED)
def test_known_steps_on_an_h100(name: str) -> None:
    """Only the model of 678 has been used to set a figure of the profile."""
    config, tokens_per_second = MEASURED[name]
    time = predict_time(config, ALONE, H100, predict_traffic(config, ALONE))
    assert 20 * 1024 / time.total == pytest.approx(tokens_per_second, rel=0.15)


def test_exchange() -> None:
    """Kraken's hides behind attention, but not one that is slower; the standard form's never does."""
    layout = replace(ALONE, sub_layer_parallel_size=4)
    kraken, standard = predict(KRAKEN, layout, H100).time, predict(GPT, layout, H100).time
    link = H100.interconnect(4, 1)
    assert kraken.hidden == pytest.approx(22 * link.all_reduce_seconds(20 * 1024 * 512 * 2, 4), rel=1e-9)
    assert standard.hidden == 0
    assert kraken.hidden > 3 * kraken.exchange
    hidden = 20 * 1024 * 768 * 2  # bytes
    one = link.all_reduce_seconds(hidden, 4)
    assert standard.exchange == pytest.approx(4 * 12 * one, rel=0.3)  # and a broadcast of 200 MB
    slow = predict(KRAKEN, layout, replace(H100, intra_node="pcie4")).time
    assert slow.exchange > 10 * kraken.exchange
    apart = predict(KRAKEN, layout, replace(H100, devices_per_node=2)).time
    assert apart.exchange > 2 * kraken.exchange, "between nodes it is slower"


def test_an_ffn_that_reads_its_stream() -> None:
    """Each stream is read once more, and its gradient written once more; nothing else changes."""
    plain, reading = (predict(replace(KRAKEN, ffn_reads_stream=on), ALONE, H100).time for on in (False, True))
    streams = KRAKEN.num_layers * KRAKEN.num_sub_layers * KRAKEN.hidden_size
    tokens = ALONE.micro_batch_size * ALONE.accumulation_steps * KRAKEN.context_length
    more = reading.element_wise - plain.element_wise
    assert more == pytest.approx(2 * streams * 2 * tokens / H100.bandwidth, rel=1e-6)
    assert reading.total - plain.total == pytest.approx(more, rel=1e-6)


def test_a_wider_embedding() -> None:
    """The loss adds to a wider gradient of the head in each chunk; sums over the ranks are those of test_traffic."""
    plain, wide = (predict(config, ALONE, H100).time for config in (KRAKEN, WIDE))
    chunks = -(-20 * 1024 // (LOGITS_AT_ONCE // 50304))
    more = 50304 * (768 - 512) * (chunks * (2 * 2 + 2 * 4) + 4 * 4)  # bytes
    assert wide.loss - plain.loss == pytest.approx(more / H100.bandwidth, rel=1e-6)
    assert wide.element_wise == plain.element_wise


def test_choices_cost_time() -> None:
    plain = predict(KRAKEN, replace(ALONE, data_parallel_size=8, accumulation_steps=4), H100).time
    again = predict(KRAKEN, replace(ALONE, data_parallel_size=8, accumulation_steps=4, activation_checkpointing=True),
                    H100).time  # fmt: skip
    assert 1.15 < again.total / plain.total < 1.35
    often = predict(KRAKEN, replace(ALONE, data_parallel_size=8, accumulation_steps=4, zero_stage=2), H100).time
    assert often.reduction > 3 * plain.reduction
    assert alignment(H100, (512, 1536), 2) > alignment(H100, (504, 1512), 2) > alignment(H100, (678, 1356), 2)


# Four models, each more work than the one before.
SMALL = KrakenConfig(2, num_layers=2, hidden_size=64, heads_per_sub_layer=1, vocab_size=512, context_length=64)
GROWING = [
    SMALL,
    replace(SMALL, num_layers=4, hidden_size=128, vocab_size=1024),
    GPTConfig(num_layers=4, hidden_size=256, num_heads=4, vocab_size=4096, context_length=128),
    replace(SMALL, num_sub_layers=4, num_layers=8, hidden_size=256, vocab_size=4096, context_length=96),
]


def predicted(here: Cluster) -> list[float]:
    """Seconds of a micro-batch of 4 of each."""
    layout = TrainingLayout(1, 1, micro_batch_size=4, accumulation_steps=1, precision="fp32")
    return [predict_time(config, layout, here, []).total for config in GROWING]


def forward_and_backward(config: KrakenConfig | GPTConfig, device: str) -> Callable[[], None]:
    """Of a micro-batch of 4, in fp32."""
    model, ids = build_model(config).to(device), random_ids(config, 4, config.context_length).to(device)

    def run() -> None:
        model.loss(ids, ids).backward()
        model.zero_grad()

    return run


def test_order_of_counted_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is predicted to take longer on this machine is more work, as PyTorch counts it."""
    monkeypatch.setattr(cluster, "best_seconds", lambda run, device: 0.05)  # in place of what is measured
    monkeypatch.setattr(cluster, "device_peak_flops", lambda device, precision: 5e10)
    here = load_cluster("this")
    assert here.bandwidth_gb == pytest.approx(2 * 2**28 / 0.05 / 1e9)
    assert here.attention_fraction == pytest.approx(7 * 2 * 4 * 256**2 * 64 / 0.05 / 5e10)
    flops = []
    for config in GROWING:
        with FlopCounterMode(display=False) as counter:
            forward_and_backward(config, "meta")()
        flops.append(counter.get_total_flops())
    for numbers in (flops, predicted(here)):
        assert all(later > 2 * earlier for earlier, later in itertools.pairwise(numbers)), numbers


@pytest.mark.slow  # seconds, which are worth little where other work shares the processor
def test_order_of_measured_steps() -> None:
    """And it takes longer. Other work only adds to a time, so the least of many is nearest to the truth."""
    predictions = (predicted(load_cluster("this")) for _ in range(20))
    assert any(seconds == sorted(seconds) for seconds in predictions)
    steps = [forward_and_backward(config, "cpu") for config in GROWING]
    least = [math.inf] * len(steps)
    for rounds in range(200):
        for index, step in enumerate(steps):
            started = time.perf_counter()
            step()
            least[index] = min(least[index], time.perf_counter() - started)
        if rounds >= 3 and least == sorted(least):
            break
    assert least == sorted(least)
