"""The stages for one GPU: 24 minutes on an H100."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kraken_train.bench.stages.stage import Command, Figures, Goal, Stage, Workplace, of_program
from kraken_train.bench.stages.ttft_figures import against_best_collective, compared

WITHOUT_CUDNN = "kraken_train.bench.stages.without_cudnn"
NO_CUDNN = "without-cudnn"
TESTS_FAILED = 1  # exit code of pytest
PROTOTYPE = "a prototype of these models on one H100: 20 x 1024 tokens, bf16, compiled"
PAPER_TTFT = "arXiv 2408.07802: +35.6% over its grid on eight A100; a prototype: +33%"
OURS, AUTHORS = "deepspeed", "authors"


def machine(place: Workplace) -> list[Command]:
    return [place.program("machine", place.preset.machine)]


def gpu_tests(place: Workplace) -> list[Command]:
    command = place.module("pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", *place.preset.tests)
    return [replace(command, accepted=(0, TESTS_FAILED))]


def outcome_of_tests(place: Workplace) -> Figures:
    """From pytest's last line, such as `3 passed, 2 skipped, 10 deselected in 4.2s`."""
    lines = (place.folder / "output.log").read_text(encoding="utf-8").splitlines()
    last = next((line for line in reversed(lines) if re.search(r"\d+ (passed|skipped|failed)", line)), "")
    counts = {kind: re.search(rf"(\d+) {kind}", last) for kind in ("passed", "failed", "error", "skipped")}
    names = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {
        **{kind: int(found[1]) if found else 0 for kind, found in counts.items()},
        **({"what failed": " ".join(names)} if names else {}),
    }


def models(place: Workplace) -> str:
    preset = place.preset
    return f"models=[{preset.baseline},{preset.paper},{preset.aligned}]"


def speed(place: Workplace) -> list[Command]:
    beside = (f"authors=[{place.preset.paper}]", "engines=[deepspeed,torch]")
    return [place.throughput("compiled", models(place), *beside)]


def plainer_speed(place: Workplace) -> list[Command]:
    few = place.preset.few_rounds
    compiled = place.throughput(NO_CUDNN, models(place), *few)
    position = compiled.arguments.index("-m") + 1
    arguments = (*compiled.arguments[:position], WITHOUT_CUDNN, *compiled.arguments[position:])
    return [
        *(place.throughput(name, models(place), *few, *more.split()) for name, more in plainer(place).items()),
        Command(arguments, compiled.environment),
    ]


def plainer(place: Workplace) -> dict[str, str]:
    """Settings by the name of their folder."""
    return {f"plainer-{number}": settings for number, settings in enumerate(place.preset.plainer)}


def by_entry(record: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Tokens per second by model and engine."""
    return {(result["model"], result["engine"]): result["tokens_per_second"] for result in record["results"]}


def speeds(place: Workplace, name: str) -> Figures:
    preset, record = place.preset, place.read(f"{name}/throughput.json")
    found = by_entry(record)
    baseline, paper = found[preset.baseline, OURS], found[preset.paper, OURS]
    aligned, authors = found[preset.aligned, OURS], found.get((preset.paper, AUTHORS))
    figures: Figures = {
        "standard, tokens/s": baseline,
        "Kraken at paper dimensions, tokens/s": paper,
        "aligned Kraken, tokens/s": aligned,
        "aligned over our standard": aligned / baseline,
    }
    if authors is not None:
        figures |= {
            "the authors' step, tokens/s": authors,
            "ours over the authors', paper dimensions": paper / authors,
            "aligned over the authors'": aligned / authors,
        }
    costs = record["deepspeed_over_torch"]
    return figures | {f"{model}: DeepSpeed over plain PyTorch, time": cost["median"] for model, cost in costs.items()}


def plainer_speeds(place: Workplace) -> Figures:
    ways = {**plainer(place), NO_CUDNN: NO_CUDNN}
    return {f"{way}: {title}": value for name, way in ways.items() for title, value in speeds(place, name).items()}


def kernels(place: Workplace) -> list[Command]:
    return [place.program("kernels", place.preset.kernels)]


def simulated_ttft(place: Workplace) -> list[Command]:
    preset = place.preset
    return [place.ttft(f"collective-{number}", *preset.ttft_cases, *settings.split())
            for number, settings in enumerate(preset.collectives)]  # fmt: skip


def simulated_ttft_figures(place: Workplace) -> Figures:
    records = {settings: place.read(f"collective-{number}/ttft.json")["results"]
               for number, settings in enumerate(place.preset.collectives)}  # fmt: skip
    figures: Figures = {}
    for settings, results in records.items():
        figures |= {f"{settings}: {title}": value for title, value in compared(results).items()}
    return figures | against_best_collective(list(records.values()))


def interrupted(place: Workplace) -> list[Command]:
    return place.training("interrupted_run")


EQUAL_BITS = "docs/training.md: determinism"
SAME_LOSSES = "tests/test_gpu.py: the tolerance of bf16"
STAGES = (
    Stage(
        "machine", 1, "versions, backends of attention, and what the machine could do at most",
        machine, of_program("machine"),
        {
            "matrix products in bf16, TFLOP/s": Goal("data sheet of the H100 SXM: the peak", expected=989),
            "memory, TB/s": Goal("data sheet of the H100 SXM: the peak", expected=3.35),
        },
    ),
    Stage(
        "gpu_tests", 6, "the tests that need a GPU",
        gpu_tests, outcome_of_tests,
        {
            "failed": Goal("none may fail", expected=0, at_most=0, on_cpu=True),
            "error": Goal("none may fail", expected=0, at_most=0, on_cpu=True),
            "passed": Goal("they are not skipped", at_least=1),
        },
    ),
    Stage(
        "speed", 5, "training speed beside the authors' step, with DeepSpeed and in plain PyTorch",
        speed, lambda place: speeds(place, "compiled"),
        {
            "standard, tokens/s": Goal(PROTOTYPE, expected=522e3),
            "Kraken at paper dimensions, tokens/s": Goal(PROTOTYPE, expected=308e3),
            "aligned Kraken, tokens/s": Goal(PROTOTYPE, expected=369e3),
            "the authors' step, tokens/s": Goal(PROTOTYPE, expected=164e3),
            "ours over the authors', paper dimensions": Goal(PROTOTYPE, expected=1.88, at_least=1.9),
            "aligned over the authors'": Goal(PROTOTYPE, expected=2.25, at_least=2.3),
            "aligned over our standard": Goal(f"{PROTOTYPE}; with fused kernels by estimate", 0.80, at_least=0.80),
        },
    ),
    Stage(
        "plainer_speed", 3, "training speed uncompiled, without fused kernels, and without cuDNN's attention",
        plainer_speed, plainer_speeds,
        {"engine.fused_kernels=false: aligned over our standard": Goal(PROTOTYPE, expected=0.71, at_least=0.75)},
    ),
    Stage(
        "kernels", 2, "the kernels of one training step, and fused ones beside compiled ones",
        kernels, of_program("kernels"),
    ),
    Stage(
        "simulated_ttft", 5, "time to the first token with simulated collectives",
        simulated_ttft, simulated_ttft_figures,
        {
            "Kraken over standard, best collective for each":
                Goal(PAPER_TTFT, 0.33, at_least=0.36),
            "Kraken: exposed communication, with the slowest collective":
                Goal("what the overlap is for", at_most=0.05),
        },
    ),
    Stage(
        "interrupted_run", 2, "deterministic=true: train, save in the background, SIGTERM or SIGKILL, continue",
        interrupted, of_program("interrupted_run"),
        {
            "exit code says interrupted": Goal("docs/training.md", at_least=True, on_cpu=True),
            "steps lost by the interruption": Goal("docs/training.md", 0, at_most=0, on_cpu=True),
            "same steps as without interruption": Goal("docs/training.md", at_least=True, on_cpu=True),
            "largest relative difference of a loss": Goal(SAME_LOSSES, 0, at_most=1e-2, on_cpu=True),
            "two runs: equal losses": Goal(EQUAL_BITS, at_least=True, on_cpu=True),
            "after SIGTERM: equal losses": Goal(EQUAL_BITS, at_least=True, on_cpu=True),
            "after SIGKILL: equal losses": Goal(EQUAL_BITS, at_least=True, on_cpu=True),
        },
    ),
)  # fmt: skip
