"""What precision=auto chooses, by the processor's flags and by what a run began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kraken_train.training import precision
from kraken_train.training.precision import choose_precision, has_native_bf16

SKYLAKE = "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512dq avx512bw avx512vl\n"
COOPER_LAKE = SKYLAKE.replace("avx512f", "avx512f avx512_bf16")
SAPPHIRE_RAPIDS = SKYLAKE.replace("avx512f", "avx512f amx_bf16 amx_tile")
GRAVITON_2 = "processor\t: 0\nFeatures\t: fp asimd atomics fphp asimdhp\n"
GRAVITON_3 = GRAVITON_2.replace("asimdhp", "asimdhp sve bf16")


@pytest.mark.parametrize(
    ("cpu_info", "native"),
    [(SKYLAKE, False), (COOPER_LAKE, True), (SAPPHIRE_RAPIDS, True), (GRAVITON_2, False), (GRAVITON_3, True)],
)
def test_flags_of_processors(cpu_info: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpu_info, encoding="utf-8")
    monkeypatch.setattr(precision, "CPU_INFO", file)
    assert has_native_bf16(torch.device("cpu")) is native


def test_a_system_that_lists_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "missing")
    assert not has_native_bf16(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "native"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_capabilities_of_gpus(capability: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_native_bf16(torch.device("cuda", 0)) is native


@pytest.mark.parametrize(
    ("requested", "recorded", "native", "name", "slow"),
    [
        ("auto", None, True, "bf16", False),
        ("auto", None, False, "fp32", False),
        ("auto", "fp32", True, "fp32", False),
        ("auto", "bf16", False, "bf16", True),
        ("bf16", "fp32", False, "bf16", True),
        ("fp32", "bf16", True, "fp32", False),
    ],
)
def test_choice(requested: str, recorded: str | None, native: bool, name: str, slow: bool) -> None:
    chosen = choose_precision(requested, recorded, native)
    assert (chosen.name, chosen.slow) == (name, slow)
    assert ("slow here" in chosen.describe()) is slow
