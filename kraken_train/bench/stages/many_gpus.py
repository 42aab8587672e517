"""The stages for several GPUs of one machine: 24 minutes on eight H100, and 12 more where vLLM is installed."""

from __future__ import annotations

from collections.abc import Mapping

from kraken_train.bench.stages.one_gpu import OURS, PAPER_TTFT, by_entry
from kraken_train.bench.stages.stage import Command, Figures, Goal, Stage, Workplace, of_program
from kraken_train.bench.stages.ttft_figures import (
    REAL_OVER_SIMULATED,
    Results,
    against_best_collective,
    compared,
    real_over_simulated,
)
from kraken_train.bench.stages.vllm_times import LEAST_GAIN
from kraken_train.bench.stages.vllm_tokens import WAYS, same_tokens
from kraken_train.training.determinism import CUBLAS, CUBLAS_CHOICES

REPEATABLE = {CUBLAS: CUBLAS_CHOICES[0]}  # which deterministic products of cuBLAS need


def curve(place: Workplace) -> list[Command]:
    return [place.program("curve", place.preset.curve, ranks=place.preset.ranks)]


def parity(place: Workplace) -> list[Command]:
    return [place.program("parity", place.preset.parity, ranks=place.preset.ranks)]


def overlap(place: Workplace) -> list[Command]:
    """On the ranks of one copy, so that all sums of the profile are within it."""
    return [place.program("overlap", place.preset.overlap, ranks=place.preset.ranks_per_copy, **REPEATABLE)]


def variants(place: Workplace, settings: Mapping[str, str], *models: str) -> list[Command]:
    """The training speed of copies on all ranks with each of the settings, by name of their folder."""
    preset = place.preset
    shared = f"parallel.sub_layer_parallel_size={preset.ranks_per_copy}"
    common = (f"models=[{','.join(models)}]", shared, *preset.few_rounds)
    return [place.throughput(name, *common, *more.split(), ranks=preset.ranks) for name, more in settings.items()]


def speeds_of_variants(place: Workplace, settings: Mapping[str, str]) -> Figures:
    """Tokens per second of each model with each of the settings, and the fastest of these."""
    found = {more: by_entry(place.read(f"{name}/throughput.json")) for name, more in settings.items()}
    figures: Figures = {}
    for model, engine in next(iter(found.values())):
        speeds = {more: of[model, engine] for more, of in found.items()}
        figures |= {f"{model}, {more}, tokens/s": value for more, value in speeds.items()}
        figures[f"{model}: fastest"] = max(speeds, key=speeds.__getitem__)
    return figures


VOCABULARIES = {"whole": "parallel.vocab_parallel=false", "cut": "parallel.vocab_parallel=true"}
ZERO_STAGES = {"zero1": "engine.zero_stage=1", "zero2": "engine.zero_stage=2"}


def vocabulary_figures(place: Workplace) -> Figures:
    whole, cut = (by_entry(place.read(f"{name}/throughput.json")) for name in VOCABULARIES)
    paper = place.preset.paper
    ratio = {"vocabulary cut over whole, paper dimensions": cut[paper, OURS] / whole[paper, OURS]}
    return speeds_of_variants(place, VOCABULARIES) | ratio


def budgets(place: Workplace) -> dict[str, str]:
    return {f"budget-{number}": settings for number, settings in enumerate(place.preset.budgets)}


def real_ttft(place: Workplace) -> list[Command]:
    """The real one on all ranks, and the simulated one for as many, with each collective."""
    preset, commands = place.preset, []
    degrees = f"degrees=[{preset.ranks}]"
    for number, (real, simulated) in enumerate(zip(preset.real_collectives, preset.collectives, strict=True)):
        commands.append(place.ttft(f"real-{number}", *preset.real_cases, *real.split(), ranks=preset.ranks))
        commands.append(place.ttft(f"simulated-{number}", *preset.real_cases, degrees, *simulated.split()))
    return commands


def real_ttft_figures(place: Workplace) -> Figures:
    figures: Figures = {}
    records: dict[str, list[Results]] = {way: [] for way in ("real", "simulated")}
    for number, name in enumerate(place.preset.real_collectives):
        pair = {way: place.read(f"{way}-{number}/ttft.json")["results"] for way in records}
        for way, results in pair.items():
            records[way].append(results)
            figures |= {f"{name}, {way}: {title}": value for title, value in compared(results).items()}
        figures |= {f"{name}: {title}": value for title, value in real_over_simulated(**pair).items()}
    for way, found in records.items():
        figures |= {f"{way}: {title}": value for title, value in against_best_collective(found).items()}
    ratios = [value for title, value in figures.items() if title.endswith(REAL_OVER_SIMULATED)]
    return figures | {f"least {REAL_OVER_SIMULATED}": min(ratios), f"largest {REAL_OVER_SIMULATED}": max(ratios)}


def lost_rank(place: Workplace) -> list[Command]:
    return place.training(
        "lost_rank", f"parallel.sub_layer_parallel_size={place.preset.ranks_per_copy}", ranks=place.preset.ranks
    )


def one_visible(place: Workplace) -> list[Command]:
    return place.training(
        "one_visible", f"parallel.sub_layer_parallel_size={place.preset.ranks_per_copy}", ranks=place.preset.ranks
    )


H100_PRESET = "conf/interconnect/h100_nvswitch.yaml"
TOLERANCES = "tests/test_gpu.py: its tolerances"
SAME_BITS = "docs/how-kraken-works.md: overlapping changes the order of events, not the sums"
STAGES = (
    Stage(
        "curve", 2, "links, and all-reduces from 4 KiB to 168 MB by algorithm",
        curve, of_program("curve"),
        {
            "NCCL, 4 KiB, us": Goal(H100_PRESET, expected=12),
            "one-shot, 4 KiB, us": Goal("vLLM's custom all-reduce: 10 against 21 us at 0.5 MB", expected=6),
            "NCCL, bus bandwidth, GB/s": Goal(H100_PRESET, expected=380),
        },
    ),
    Stage(
        "parity", 3, "training on all ranks as in one process, for all ways to share them",
        parity, of_program("parity"),
        {
            "fp32: largest relative difference of a loss": Goal(TOLERANCES, 0, at_most=1e-4, on_cpu=True),
            "bf16: largest relative difference of a loss": Goal(TOLERANCES, 0, at_most=1e-2, on_cpu=True),
        },
    ),
    Stage(
        "overlap", 3, "overlapped against blocking sums, to the bit, and how much of them the attention hides",
        overlap, of_program("overlap"),
        {
            "overlapped twice: equal bits": Goal("deterministic kernels", at_least=True, on_cpu=True),
            "overlapped and blocking: equal bits": Goal(SAME_BITS, at_least=True, on_cpu=True),
            "AllReduce of the layers within the attention part": Goal("what the overlap is for", at_least=0.7),
        },
    ),
    Stage(
        "copies", 3, "training speed of several copies on all ranks, vocabulary whole and cut",
        lambda place: variants(place, VOCABULARIES, place.preset.paper, place.preset.aligned), vocabulary_figures,
        {
            "vocabulary cut over whole, paper dimensions":
                Goal("an estimate of matrix work at 125M, 4-way: 23.4 to 18 ms a step", expected=1.3, at_least=1.0),
        },
    ),
    Stage(
        "budgets", 3, "multiprocessors for communication and for products",
        lambda place: variants(place, budgets(place), place.preset.aligned),
        lambda place: speeds_of_variants(place, budgets(place)),
    ),
    Stage(
        "zero", 2, "ZeRO stage 1 against stage 2",
        lambda place: variants(place, ZERO_STAGES, place.preset.aligned),
        lambda place: speeds_of_variants(place, ZERO_STAGES),
    ),
    Stage(
        "real_ttft", 5, "time to the first token with real collectives, beside simulated ones",
        real_ttft, real_ttft_figures,
        {
            "least real over simulated time": Goal("the simulation may be quoted", 1, at_least=0.95),
            "largest real over simulated time": Goal("the simulation may be quoted", 1, at_most=1.05),
            "real: Kraken over standard, best collective for each": Goal(PAPER_TTFT, 0.33, at_least=0.36),
            "real: Kraken: exposed communication, with the slowest collective":
                Goal("what the overlap is for", at_most=0.05),
        },
    ),
    Stage(
        "lost_rank", 2, "a rank is killed; the others end and the run continues",
        lost_rank, of_program("lost_rank"),
        {
            "the job fails": Goal("docs/monitoring.md", at_least=True, on_cpu=True),
            "no process is left": Goal("docs/monitoring.md", at_least=True, on_cpu=True),
            "continued to its end": Goal("docs/monitoring.md", at_least=True, on_cpu=True),
            "seconds until all ranks have ended": Goal("watchdog_seconds of conf/train.yaml, 45", at_most=60),
        },
    ),
    Stage(
        "one_visible", 1, "training where each rank sees its own GPU only",
        one_visible, of_program("one_visible"),
        {"all ranks succeed": Goal("docs/clusters.md", at_least=True, on_cpu=True)},
    ),
    Stage(
        "vllm_tokens", 6, "a Kraken in vLLM: tokens of one rank and of several",
        lambda place: [place.program("vllm_tokens", place.preset.vllm)], of_program("vllm_tokens"),
        {same_tokens(way): Goal("docs/serving.md", at_least=True, on_cpu=True) for way in WAYS},
    ),
    Stage(
        "vllm_times", 6, "a Kraken in vLLM: times with and without overlap",
        lambda place: [place.program("vllm_times", place.preset.vllm)], of_program("vllm_times"),
        {LEAST_GAIN: Goal("what the overlap is for", at_least=1.0)},
    ),
)  # fmt: skip
