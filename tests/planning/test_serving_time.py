"""Predicted passes against formulas that are written out, for every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kraken_train.bench.grid import Size, architectures, model_config
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.head_dims import computed_size
from kraken_train.planning import cluster as clusters
from kraken_train.planning.cluster import Cluster, load_cluster
from kraken_train.planning.interconnect import Interconnect
from kraken_train.planning.serving_time import Load, predict_pass

RATE, BANDWIDTH, LAYERS, VOCABULARY = 1e12, 1e9, 8, 4096
SIZE = Size("small", LAYERS, 1024, head_dim=128)
WIDE = "kraken with a wider embedding"


@pytest.fixture
def cluster() -> Cluster:
    """Whose matrix units reach RATE with any shape, and whose memory moves BANDWIDTH."""
    everything = dict.fromkeys(
        ("matrix_fraction", "rows_of_16_bytes", "other_rows", "attention_fraction", "wide_head_fraction",
         "bandwidth_fraction"), 1.0,
    )  # fmt: skip
    peaks = {"device": None, "bf16_tflops": RATE / 1e12, "fp32_tflops": RATE / 1e12, "bandwidth_gb": BANDWIDTH / 1e9}
    return replace(load_cluster("dgx_h100"), **everything, **peaks)


def made(architecture: str, degree: int = 4) -> ModelConfig:
    if architecture == WIDE:
        return model_config("kraken", SIZE, degree, VOCABULARY, 512).replace(embedding_size=1536)
    return model_config(architecture, SIZE, degree, VOCABULARY, 512)


@pytest.mark.parametrize("architecture", [*architectures(), WIDE])
def test_arithmetic_of_a_prompt(cluster: Cluster, architecture: str) -> None:
    """Two operations per weight and token, but for the head only the last token, and the causal half of the scores."""
    config, (sequences, tokens) = made(architecture), (3, 256)
    head = VOCABULARY * config.embedding_width
    weights = config.matrix_parameters - head
    width = config.attention_width * computed_size(config.head_size) / config.head_size  # as kernels compute it
    scores = 2 * sequences * tokens**2 * width * LAYERS
    flops = 2 * sequences * tokens * weights + 2 * sequences * head + scores
    fast_memory = replace(cluster, bandwidth_gb=1e9)
    found = predict_pass(config, 1, Load(sequences, tokens), fast_memory, "bf16")
    assert found.computed == pytest.approx(flops / RATE, rel=1e-3)
    assert (found.exposed, found.hidden) == (0, 0)


@pytest.mark.parametrize("architecture", [*architectures(), WIDE])
def test_memory_of_a_token(cluster: Cluster, architecture: str) -> None:
    """The weights are read once, and the keys and values of all tokens before; activations are few."""
    config, cached = made(architecture), 8192
    fast_matrices = replace(cluster, bf16_tflops=1e9)
    short, long = (predict_pass(config, 1, Load(2, 1, n), fast_matrices, "bf16").computed for n in (0, cached))
    assert short == pytest.approx(2 * config.matrix_parameters / BANDWIDTH, rel=0.02)  # and few activations
    assert long - short == pytest.approx(2 * 2 * cached * config.cache_width * LAYERS / BANDWIDTH, rel=1e-6)


@pytest.mark.parametrize("architecture", [*architectures(), WIDE])
def test_what_is_waited_for(cluster: Cluster, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sums of a second each: those that nothing hides, and of the others what exceeds the computation."""
    link = Interconnect("link", latency_us=1e6, bus_bandwidth=None, source="")
    monkeypatch.setattr(clusters, "load_interconnect", lambda _: link)
    config, load = made(architecture), Load(1, 256)
    found = predict_pass(config, 4, load, cluster, "bf16")
    sums = {
        "kraken": LAYERS, WIDE: LAYERS + 1, "standard": 2 * LAYERS, "parallel": LAYERS, "ladder": 2 * LAYERS,
        "fal": LAYERS + 1,
    }  # fmt: skip
    hidden = {"kraken": LAYERS - 1, WIDE: LAYERS, "ladder": 2 * LAYERS - 1}.get(architecture, 0)
    total = sums.get(architecture, LAYERS // 4)  # tracks are summed every four layers
    assert found.exposed + found.hidden == pytest.approx(total + 1)  # and the logits are gathered
    assert (found.hidden > 0) == (hidden > 0)
    assert found.hidden < found.computed
    # With sums that take less than any part, all of these are hidden, to the last.
    link = replace(link, latency_us=0.001)
    assert predict_pass(config, 4, load, cluster, "bf16").hidden == pytest.approx(hidden * 1e-9)
