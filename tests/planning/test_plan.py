"""The search and the command: what is chosen and why, what is refused and how."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import run_here, user_error

from kraken_train.common.cli import CONF_DIR
from kraken_train.common.errors import ConfigError
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.planning.cluster import load_cluster
from kraken_train.planning.memory import shards
from kraken_train.planning.prediction import Prediction
from kraken_train.planning.search import Constraints, reasons, search

H100 = load_cluster("dgx_h100")
SMALL = KrakenConfig(4, num_layers=4, hidden_size=256, heads_per_sub_layer=2, vocab_size=4096, context_length=256)
STANDARD = GPTConfig(num_layers=4, hidden_size=512, num_heads=8, vocab_size=4096, context_length=256)
HUGE = GPTConfig(num_layers=10, hidden_size=16384, num_heads=64, vocab_size=50304, context_length=2048)
PROFILES = sorted(path.stem for path in (CONF_DIR / "cluster").glob("*.yaml"))


def test_profiles() -> None:
    assert PROFILES == ["dgx_a100", "dgx_h100", "h200_node", "l40s_pcie", "this"]
    for name in PROFILES:
        cluster = load_cluster(name)
        cluster.validate()
        assert cluster.name == name
        assert cluster.source
        assert cluster.peak_flops("bf16") > 0
        assert cluster.bandwidth > 0
        assert cluster.usable_bytes > 0
    assert load_cluster("dgx_a100").peak_flops("bf16") == 312e12


def test_groups_within_and_between_nodes() -> None:
    assert H100.interconnect(8, 1).name == H100.interconnect(2, 4).name == "h100_nvswitch"
    # Between nodes every device has a link: all eight of a node together, or each for a group of its own.
    assert H100.interconnect(16, 1).bus_bandwidth == 8 * 46
    assert H100.interconnect(2, 8).bus_bandwidth == 46


def test_what_fits_is_ranked() -> None:
    plan = search(SMALL, H100, nodes=1, global_batch_size=256)
    speeds = [prediction.tokens_per_second for prediction in plan.ranked]
    assert speeds[0] > 0.98 * max(speeds)
    assert all(a >= b for a, b in itertools.pairwise(speeds[1:]))
    for prediction in plan.ranked:
        layout = prediction.layout
        assert layout.devices == 8
        assert layout.global_batch_size == 256
        assert prediction.fits
        assert 0 < prediction.mfu < 1
    assert {prediction.layout.sub_layer_parallel_size for prediction in plan.ranked} == {1, 2, 4}
    assert "P=8 does not divide model.num_sub_layers=4" in plan.refused
    assert any("micro_batch_size=" in reason for reason in reasons(plan, H100, SMALL))


def test_less_memory_changes_the_choice() -> None:
    constraints = Constraints(sub_layer_parallel_size=1, zero_stage=1, activation_checkpointing=False)

    def best(memory_gb: float) -> Prediction:
        return search(SMALL, replace(H100, memory_gb=memory_gb), 1, 128, constraints).best

    roomy, tight = best(85.0), best(4.5)
    assert tight.layout.micro_batch_size < roomy.layout.micro_batch_size
    assert tight.memory.total <= tight.usable_bytes < roomy.memory.total
    assert tight.tokens_per_second <= roomy.tokens_per_second


@pytest.mark.parametrize(("model", "size"), [(SMALL, 1), (SMALL, 4), (STANDARD, 2)])
def test_muon(model: ModelConfig, size: int) -> None:
    """Less state, more work; matrices travel where the devices of a copy hold parts of them, or across a border."""
    constraints = Constraints(size, micro_batch_size=4, zero_stage=1, activation_checkpointing=False)
    adamw, muon = (
        search(model, H100, 1, 256, replace(constraints, vocab_parallel=False, optim=optim)).best
        for optim in ("adamw", "muon")
    )
    assert muon.layout.overrides.endswith("optim=muon")
    # Kept are 2 numbers instead of 3 for all but embeddings, norms and padding.
    assert 2 / 3 < muon.memory.optimizer / adamw.memory.optimizer < 0.85
    assert muon.time.update > adamw.time.update
    assert muon.time.matrices == adamw.time.matrices
    exchanged = [collective for collective in muon.traffic if collective.kind == "all-to-all"]
    assert not any(collective.kind == "all-to-all" for collective in adamw.traffic)
    if size == 2:  # a standard model: half of the elements come from the other device, for whole matrices, and return
        of_matrices = model.num_parameters - (model.vocab_size + model.context_length) * model.hidden_size
        expected = 2 * of_matrices / 2 / 4 / 2  # bytes; devices of a copy, copies, half
        assert [collective.group for collective in exchanged] == ["model copy"] * 2
        for collective in exchanged:
            assert collective.size == pytest.approx(expected, rel=0.1)
    else:
        assert sum(collective.size for collective in exchanged) < 0.3 * 2 * model.num_parameters / muon.layout.devices


def test_teacher() -> None:
    """A forward pass of the same model is a third of its products, and has the weights; and both are shared alike."""
    constraints = Constraints(2, micro_batch_size=4, zero_stage=1, activation_checkpointing=False, vocab_parallel=True)
    teacher = SMALL.replace(context_length=512)  # of which the samples have 256
    plain = search(SMALL, H100, 1, 256, constraints).best
    plan = search(SMALL, H100, 1, 256, replace(constraints, teacher=teacher))
    taught = plan.best
    assert plain.time.teacher is None
    assert replace(taught.time, teacher=None) == plain.time
    forward = plain.time.matrices / 3 + plain.time.attention * 2 / 7
    assert taught.time.teacher is not None
    assert forward < taught.time.teacher < 1.2 * (plain.time.total - plain.time.update) / 2
    assert taught.tokens_per_second < plain.tokens_per_second
    assert taught.mfu * taught.time.total == pytest.approx(plain.mfu * plain.time.total * 4 / 3)
    positions = 256 * SMALL.hidden_size  # more, which the samples do not need
    assert taught.memory.weights - plain.memory.weights == pytest.approx(plain.memory.weights + 2 * positions, rel=1e-3)
    assert any(reason.startswith("the teacher takes") for reason in reasons(plan, H100, SMALL))
    json.dumps(taught.as_dict())

    three = GPTConfig(num_layers=4, hidden_size=384, num_heads=6, vocab_size=4096, context_length=256)
    plan = search(SMALL, H100, 1, 256, replace(constraints, sub_layer_parallel_size=None, teacher=three))
    assert {prediction.layout.sub_layer_parallel_size for prediction in plan.ranked} == {1, 2}
    assert "P=4 does not divide model.num_heads=6 of the teacher" in plan.refused
    with pytest.raises(ConfigError, match=r"=4 does not divide .* of the teacher; use 1 or 2"):
        search(SMALL, H100, 1, 256, Constraints(4, teacher=three))


def test_what_the_user_fixes_stays() -> None:
    constraints = Constraints(2, micro_batch_size=4, zero_stage=2, activation_checkpointing=True, vocab_parallel=True)
    (only,) = search(SMALL, H100, 1, 256, constraints).ranked
    layout = only.layout
    assert (layout.sub_layer_parallel_size, layout.micro_batch_size, layout.accumulation_steps) == (2, 4, 16)
    assert layout.zero_stage == 2
    assert layout.activation_checkpointing
    assert layout.vocab_parallel


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"nothing fits into the 81.0 GB .* of which .* GB are .*; use "):
        search(HUGE, H100, 1, 8, Constraints(sub_layer_parallel_size=1, micro_batch_size=1, vocab_parallel=False))
    for constraints, message in (
        (
            Constraints(sub_layer_parallel_size=3),
            "sub_layer_parallel_size=3 does not divide model.num_sub_layers=4; use 1",
        ),
        (Constraints(micro_batch_size=7), "micro_batch_size=7 does not divide the 32 samples of a copy"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(SMALL, H100, 1, 256, constraints)
    with pytest.raises(ConfigError, match="which do not divide global_batch_size=3"):
        search(SMALL, H100, 1, 3)
    tiny = replace(SMALL, vocab_size=5)
    with pytest.raises(ConfigError, match=r"P=4 is too much for the 5 rows of model\.vocab_size"):
        search(tiny, H100, 1, 256, Constraints(sub_layer_parallel_size=4, vocab_parallel=True))
    plan = search(tiny, H100, 1, 256, Constraints(sub_layer_parallel_size=4, micro_batch_size=4))
    assert not any(prediction.layout.vocab_parallel for prediction in plan.ranked)


@pytest.mark.parametrize("vocab_size", [50304, 50257])
def test_a_large_vocabulary_is_shared(vocab_size: int) -> None:
    """Also one that the devices cannot divide; the first device has the most rows."""
    model = replace(SMALL, vocab_size=vocab_size)
    plan = search(model, H100, 1, 256, Constraints(sub_layer_parallel_size=2, micro_batch_size=4))
    layout = plan.best.layout
    assert layout.vocab_parallel
    assert any(not prediction.layout.vocab_parallel for prediction in plan.ranked)
    whole = shards(model, replace(layout, vocab_parallel=False)).elements
    assert shards(model, layout).elements == whole - vocab_size // 2 * model.hidden_size


def test_command(tmp_path: Path) -> None:
    done = run_here(
        "kraken_train.plan", "model=kraken-tiny-4way", "vocab_size=300", "cluster=l40s_pcie", "nodes=2",
        "global_batch_size=32", "max_tokens=1M", "optim=muon", f"output={tmp_path}/plan.json",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "to train so: parallel.sub_layer_parallel_size=" in done.stdout
    assert " optim=muon" in " ".join(done.stdout.split())
    record = json.loads((tmp_path / "plan.json").read_text())
    best = record["ranked"][0]
    run = re.search(r"1M tokens are 245 steps of 4,096 tokens, which take (\d+) s, without", done.stdout)  # 244.1 steps
    assert run is not None
    assert int(run[1]) == int(245 * best["seconds"]["total"])
    assert (
        sum(best["memory"][part] for part in ("weights", "optimizer", "gradients", "activations", "working"))
        == (best["memory"]["total"])
    )
    assert best["choices"]["data_parallel_size"] * best["choices"]["sub_layer_parallel_size"] == 16
    assert (tmp_path / "memory.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=kraken-tiny-4way"], "give vocab_size=NUMBER"),
        (["zero_stage=3"], "engine.zero_stage=3 is not supported"),
        (["cluster=dgx"], "cluster=dgx is not known; use one of dgx_a100"),
        (["nodes=0"], "nodes=0 must be greater than 0"),
        (["cluster.matrix_fraction=2"], "cluster.matrix_fraction=2.0 must be greater than 0 and at most 1"),
        (["max_tokens=1Q"], "max_tokens=1Q: no whole number of tokens"),
        (["micro_batch=3"], "micro_batch is not a setting (did you mean micro_batch_size?)"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    assert message in user_error(run_here("kraken_train.plan", *arguments))
