"""The command, on one rank with simulated collectives and on two with gloo, and what it is made of."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import launch_ranks, run_here, user_error
from matplotlib.figure import Figure
from pretend_clock import pretend
from rich.console import Console
from torch.nn import functional as F

from kraken_train.bench.breakdown import HIDDEN, PARTS, Interval
from kraken_train.bench.figures import draw_breakdowns, short_label
from kraken_train.bench.grid import SIZES, architectures, model_config
from kraken_train.bench.plan import bytes_by_depth, make_plan
from kraken_train.bench.results import Case, Result, as_table, footnote, summarize
from kraken_train.bench.timing import Conditions, Figures, attention_kernels, extrapolate, of_slowest_rank
from kraken_train.common.errors import ConfigError
from kraken_train.inference.memory import serving_memory
from kraken_train.parallel.sharding import ModelRank

TINY = {
    "sizes": "[tiny]", "contexts": "[16]", "degrees": "[2]", "vocab_size": "512", "output_tokens": "2", "repeats": "3",
}  # fmt: skip
CONDITIONS = Conditions(
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    compile=True,
    cuda_graphs=True,
    batch_size=1,
    context=2048,
    output_tokens=16,
    repeats=1,
)


def arguments(folder: Path, **settings: str) -> list[str]:
    return [f"{key}={value}" for key, value in {**TINY, "output_dir": str(folder), **settings}.items()]


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ttft.json").read_text())


def seconds(result: dict[str, Any], name: str, kind: str) -> float:
    figure = result[name]
    assert figure["kind"] == kind
    return figure["seconds"]


@pytest.mark.parametrize("layers", ["paper", pytest.param("modern", marks=pytest.mark.slow)])
def test_simulated(layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which attention takes 10 ms, a collective 25 ms and nothing else any time."""
    clock, attend = pretend(monkeypatch), F.scaled_dot_product_attention

    def attend_for_a_while(*arguments: Any, **options: Any) -> torch.Tensor:
        clock.seconds += 0.010
        return attend(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_for_a_while)
    collectives = {"kraken": 2, "standard": 4, "parallel": 2, "ladder": 4, "fal": 3, "track": 1}
    slow = {"interconnect": "pcie4", "interconnect.latency_us": "25000", "layers": layers}
    slow["architectures"] = f"[{','.join(collectives)}]"
    ran = run_here("kraken_train.bench.ttft", *arguments(tmp_path, **slow))
    assert ran.returncode == 0, ran.stderr
    record = load(tmp_path)
    assert record["kind"] == "simulated"
    assert record["device"].startswith("CPU")
    assert record["processes"] == 1
    assert record["interconnect"]["name"] == "pcie4"
    assert record["interconnect"]["changed"]
    assert record["interconnect"]["latency_us"] == 25000
    assert record["interconnect"]["bus_bandwidth"] == 20
    assert record["versions"]["torch"] == torch.__version__
    results = {result["architecture"]: result for result in record["results"]}
    assert set(results) == set(collectives)
    computed = 2 * 0.010  # of two layers
    for name, result in results.items():
        asked = result["asked_of_interconnect"]
        assert (asked["all_reduces"], asked["all_gathers"]) == (collectives[name], 1)
        assert asked["seconds"] == pytest.approx(0.025 * (collectives[name] + 1), rel=0.01)
        overlaps = name in ("kraken", "ladder")
        hidden = 0.010 if overlaps else 0.0  # behind the attention of the second layer
        assert seconds(result, "compute_alone", "measured") == pytest.approx(computed)
        assert seconds(result, "hidden_communication", "simulated") == pytest.approx(hidden)
        assert seconds(result, "exposed_communication", "simulated") == pytest.approx(asked["seconds"] - hidden)
        assert seconds(result, "ttft", "simulated") == pytest.approx(computed + asked["seconds"] - hidden)
        for figure in ("ttft", "exposed_communication", "hidden_communication", "time_per_output_token"):
            assert result[figure]["low"] <= result[figure]["seconds"] <= result[figure]["high"]
        assert "aten::scaled_dot_product_attention" in result["attention_kernels"]
        assert set(result["ttft_variants"]) == {"overlapped", "silent"} | ({"blocking"} if overlaps else set())
        # A further token waits as often as the first, for less.
        token = seconds(result, "time_per_output_token", "simulated")
        assert token == pytest.approx(computed + 0.025 * (collectives[name] + 1) - hidden, rel=0.01)
        # The profile is of real time, of which a transfer takes what is left of it when it is waited for.
        parts = {part: figure["seconds"] for part, figure in result["breakdown"].items()}
        assert parts.pop("hidden_all_reduce") >= 0
        assert sum(parts.values()) > asked["seconds"] - hidden
        assert parts["exposed_all_reduce"] > 0.025 * collectives[name] - hidden
        assert result["scaled_from_layers"] is None
        assert result["interleaved"]
        assert result["layers"]["norm"] == {"paper": "layernorm", "modern": "rmsnorm"}[layers]
        assert result["layers"]["qk_norm"] == (layers == "modern")
    faster = record["summary"]["kraken"]["speed_up_over_standard"]["value"]
    assert faster == pytest.approx(0.145 / 0.085 - 1, rel=0.01)
    for text in ("simulated", "pcie4 (changed)", "standard", f"{faster:+.1%} over the standard"):
        assert text in ran.stdout
    for name in ("speed_up.png", "breakdown.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_two_ranks(tmp_path: Path) -> None:
    launch_ranks(2, "-m", "kraken_train.bench.ttft", *arguments(tmp_path, degrees="null", repeats="1"))
    record = load(tmp_path)
    assert record["kind"] == "measured"
    assert record["processes"] == 2
    assert record["interconnect"] == {"name": "gloo", "collectives": "auto"}
    for result in record["results"]:
        assert result["devices"] == 2
        assert result["asked_of_interconnect"]["all_gathers"] == 1
        assert "seconds" not in result["asked_of_interconnect"]
        assert seconds(result, "ttft", "measured") > 0
        assert seconds(result, "compute_alone", "measured") > 0
        parts = {part: figure["seconds"] for part, figure in result["breakdown"].items()}
        assert parts["gemm"] > 0
        assert parts["exposed_all_reduce"] > 0
    assert '"kind": "simulated"' not in (tmp_path / "ttft.json").read_text()
    assert (tmp_path / "speed_up.png").is_file()
    assert (tmp_path / "breakdown.png").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": "[7b]"}, "sizes=7b is not known; use tiny or 1.3b"),
        ({"architectures": "[krake]"}, "did you mean kraken?"),
        ({"architectures": "[]"}, "architectures=[] must name at least one"),
        ({"contexts": "[16,16]"}, "contexts=[16, 16] must name at least one, and none twice"),
        ({"contexts": "[0]"}, "contexts=0 must be greater than 0"),
        ({"degrees": "[1]"}, "degrees=1 must be at least 2"),
        ({"degrees": "[3]"}, "degrees=3"),
        ({"dtype": "fp8"}, "dtype=fp8 is not known; use bf16 or fp32"),
        ({"cuda_graphs": "true", "device": "cpu"}, "cuda_graphs=true needs a GPU"),
        ({"interconnect.bus_bandwidth": "-1"}, "interconnect.bus_bandwidth=-1.0 must be greater than 0"),
        ({"interconnect": "infiniband"}, "use one of a100_nvswitch"),
        ({"output_dir": "/dev/null/x"}, "output_dir=/dev/null/x cannot be written to: Not a directory"),
        ({"sizes": "[175b]", "degrees": "[4]", "device": "cpu"}, "sizes=175b, contexts=16: the share of one"),
    ],
)  # fmt: skip
def test_refusals(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    assert message in user_error(run_here("kraken_train.bench.ttft", *arguments(tmp_path, **settings)))
    assert not (tmp_path / "ttft.json").exists()


def test_ranks_must_be_the_degree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    message = user_error(run_here("kraken_train.bench.ttft", *arguments(tmp_path)))
    assert "degrees=[2] must be [3], the number of ranks that were started" in message


def test_plan() -> None:
    models = {name: model_config(name, SIZES["175b"], 4, 50304, 2064) for name in architectures()}
    needs = {name: bytes_by_depth(config, 4, CONDITIONS) for name, config in models.items()}
    for name, config in models.items():
        _, units = config.parallel_units
        memory = serving_memory(config, ModelRank(0, 4).unit_range(units), 1, 2064, torch.bfloat16)
        engines = 3 if name in ("kraken", "ladder") else 2  # those that overlap
        assert needs[name](96) == memory.weights + engines * (memory.cache + memory.activations)
    everything, largest = sum(need(96) for need in needs.values()), max(need(96) for need in needs.values())
    assert make_plan(models, 4, CONDITIONS, everything).groups == (architectures(),)
    one_by_one = make_plan(models, 4, CONDITIONS, everything - 1)
    assert one_by_one.groups == tuple((name,) for name in architectures())
    assert one_by_one.depths == (96,)
    assert make_plan(models, 4, CONDITIONS, largest).groups == one_by_one.groups
    for usable in (largest - 1, sum(need(8) for need in needs.values())):
        scaled = make_plan(models, 4, CONDITIONS, usable)
        few, more = scaled.depths
        assert scaled.groups == (architectures(),)
        assert 1 <= few < more <= 12
        assert few % 4 == more % 4 == 0  # tracks are summed every 4 layers
        assert sum(need(more) for need in needs.values()) <= usable
    on_cpu = replace(CONDITIONS, device=torch.device("cpu"))
    for conditions, usable in ((on_cpu, largest - 1), (CONDITIONS, 10**9)):
        with pytest.raises(ConfigError, match="the share of one of 4 devices takes"):
            make_plan(models, 4, conditions, usable)


def test_extrapolation() -> None:
    """Each round goes its own way, and so the differences between variants."""

    def at(depth: int) -> Figures:
        rounds = np.array([1.0, 5.0, 3.0])
        times = {"overlapped": 5 + rounds * depth, "silent": rounds + 2 * depth}
        return Figures(times, times, {"norm": 1.0, "gemm": 2.0 * depth}, {"seconds": 3.0 * depth}, (f"of {depth}",))

    found, expected = extrapolate(at(4), at(12), (4, 12), 96), at(96)
    for variant in ("overlapped", "silent"):
        assert found.ttft[variant].tolist() == expected.ttft[variant].tolist()
        assert found.output_token[variant].tolist() == expected.output_token[variant].tolist()
    assert (found.breakdown, found.traffic) == (expected.breakdown, expected.traffic)
    assert found.attention_kernels == ("of 12",)


def one_result(interleaved: bool = True, scaled_from: tuple[int, int] | None = None) -> Result:
    """Rounds that the machine slows down ever more, all variants alike."""
    drift = np.array([0.0, 0.1, 0.4, 0.2, 0.8])
    exposed, hidden = np.array([1.0, 2.0, 3.0, 4.0, 9.0]) * 1e-3, np.array([7.0, 5.0, 5.0, 5.0, 4.0]) * 1e-3
    times = {"silent": drift, "overlapped": drift + exposed, "blocking": drift + exposed + hidden}
    parts = dict.fromkeys((*PARTS, HIDDEN), 0.1)
    figures = Figures(times, times, parts, {"seconds": 1.0}, ("flash",))
    config = model_config("kraken", SIZES["tiny"], 2, 64, 64)
    return Result(Case("tiny", 128, 2), config, figures, scaled_from, interleaved, "simulated")


def test_spread() -> None:
    """Of the differences within rounds, which are far smaller than those from one round to another."""
    record = one_result().to_dict()

    def spread(name: str) -> tuple[float, ...]:
        return tuple(round(record[name][key] * 1e3, 9) for key in ("low", "seconds", "high"))

    assert spread("exposed_communication") == (2, 3, 4)
    assert spread("hidden_communication") == (5, 5, 5)
    assert spread("ttft") == spread("time_per_output_token") == (102, 204, 403)
    assert spread("compute_alone") == (100, 200, 400)
    assert record["attention_kernels"] == ("flash",)
    printed = rendered([one_result()])
    assert "3.000 ± 1.000" in printed
    assert "5.000 ± 0.000" in printed
    assert "half the distance" in printed


def rendered(results: list[Result]) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(as_table(results, "title"))
    return console.export_text()


def test_marks(tmp_path: Path) -> None:
    """What was not run in turns, or not at its depth, says so wherever it is shown."""
    assert footnote([one_result()]) is None
    assert "TINY†" not in rendered([one_result()])
    for scaled_from, mark in ((None, "†"), ((4, 12), "*†")):
        result = one_result(interleaved=False, scaled_from=scaled_from)
        printed = rendered([result])
        assert f"TINY{mark}" in printed
        assert "† the models fit into memory only one by one" in printed
        assert ("* does not fit into memory" in printed) == (scaled_from is not None)
        assert short_label(result.case, result).startswith(f"TINY{mark}\n")
        with mock.patch.object(Figure, "suptitle") as title:
            draw_breakdowns([result], "title", tmp_path / "figure.png")
        assert title.call_args.args[0] == f"title\n{footnote([result])}"


def test_slowest_rank() -> None:
    """Of each round, for both times on its own."""
    others = [[(1.0, 20.0), (5.0, 6.0)], [(2.0, 10.0), (4.0, 7.0)]]
    runtime = mock.Mock(gather=lambda own: [*others, own])
    first, further = of_slowest_rank([(0.0, 0.0), (0.0, 9.0)], runtime)
    assert first.tolist() == [2, 5]
    assert further.tolist() == [20, 9]


def test_attention_kernels() -> None:
    names = ["gemm", "flash_b", "layer_norm", "flash_a", "flash_b", "fmha", "sdpa", "attention"]
    intervals = [Interval(name, start, start + 1) for start, name in enumerate(names)]
    assert attention_kernels(intervals) == ("flash_b", "flash_a", "fmha", "sdpa")


def test_geometric_means() -> None:
    """Over cases in which Kraken is 2 and 8 times as fast, and exposes half of its time and none."""
    results = []
    for context, (kraken, compute) in {128: (0.5, 0.25), 2048: (0.125, 0.125)}.items():
        for name, ttft in (("standard", 1.0), ("kraken", kraken)):
            times = {"overlapped": np.array([ttft]), "silent": np.array([0.25 if name == "standard" else compute])}
            figures = Figures(times, times, {}, {}, ())
            config = model_config(name, SIZES["tiny"], 2, 64, 64)
            results.append(Result(Case("tiny", context, 2), config, figures, None, True, "simulated"))
    means = {name: {key: mean["value"] for key, mean in of.items()} for name, of in summarize(results).items()}
    assert means["kraken"]["speed_up_over_standard"] == pytest.approx(4 - 1)
    assert means["kraken"]["compute_over_standard_s"] == pytest.approx((1 * 0.5) ** 0.5)
    assert means["kraken"]["exposed_share_of_ttft"] == pytest.approx(1 - 1 / 2**0.5)
    assert means["standard"] == {"exposed_share_of_ttft": pytest.approx(0.75)}
