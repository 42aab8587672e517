"""Seconds by operator, from intervals made by hand and from real profiles."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kraken_train.bench import link
from kraken_train.bench.breakdown import (
    ATTENTION,
    EXPOSED,
    GEMM,
    HEAD,
    HIDDEN,
    IDLE,
    NORM,
    OTHER,
    PARTS,
    Interval,
    break_down,
    parse_event,
    parse_trace,
    record,
)
from kraken_train.bench.link import ThreadLink
from kraken_train.bench.simulated_communicator import SimulatedCommunicator
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.interconnect import Interconnect

# As CUPTI names them on an H100 with PyTorch 2.
KERNELS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN": GEMM,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": GEMM,
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)": GEMM,
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128>(...)": GEMM,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)": GEMM,
    "triton_tem_fused_mm_2": GEMM,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, cutlass::bfloat16_t>>(...)": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)": ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1": ATTENTION,
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(...)": NORM,
    "triton_red_fused_add_native_layer_norm_0": NORM,
    "triton_per_fused_add_mul_rsqrt_sub_var_mean_1": NORM,
    "triton_poi_fused_gelu_mm_3": None,
    "layer_entry_backward_kernel": NORM,
    "ffn_entry_kernel_0": NORM,
    "triton_poi_fused__scaled_dot_product_flash_attention_clone_2": None,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(...)": None,
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "all_reduce",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "all_gather",
    "all_reduce_spin": "all_reduce",
    "void c10d::symmetric_memory::one_shot_all_reduce_kernel<c10::BFloat16, 16, 8>(...)": "all_reduce",
    "all_gather_spin": "all_gather",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_names(name: str) -> None:
    assert Interval(name, 0, 1).kind == KERNELS[name]


def test_by_hand() -> None:
    """Computing to 7, a sum from 2 to 9 on another stream, the head from 10 to 13, something from 13.5 to 14."""
    parts = break_down(
        [
            Interval("layer_norm", 0, 1),
            Interval("gemm", 1, 4),
            Interval("flash", 4, 6),
            Interval("elementwise", 6, 7),
            Interval("all_reduce_spin", 2, 9, thread=7),
            Interval("gemm", 10, 12),
            Interval("all_gather_spin", 12, 13),
            Interval("argmax", 13.5, 14),
        ]
    )
    assert parts == {
        NORM: 1,
        GEMM: 3,
        ATTENTION: 2,
        OTHER: 1.5,
        HEAD: 3,
        HIDDEN: 5,
        EXPOSED: 2,
        IDLE: 1.5,
    }
    assert sum(parts[part] for part in PARTS) == 14


def test_nested_and_without_sums() -> None:
    """On the CPU operators contain others: the outermost known one counts, and an unknown one for what is left."""
    parts = break_down(
        [
            Interval("aten::linear", 0, 10),
            Interval("aten::t", 1, 2),
            Interval("aten::addmm", 2, 9),
            Interval("aten::unknown", 10, 20),
            Interval("aten::layer_norm", 12, 15),
            Interval("aten::linear", 21, 25),
        ]
    )
    assert (parts[GEMM], parts[HEAD], parts[NORM], parts[OTHER], parts[IDLE]) == (10, 4, 3, 7, 1)
    with pytest.raises(ValueError, match="profile is empty"):
        break_down([])


def test_events() -> None:
    """Of a GPU's trace only what the device did counts, of a CPU's only operators and collectives."""
    event = {"ph": "X", "name": "aten::mm", "ts": 3e6, "dur": 5e5, "tid": 7}
    for cat, on_gpu in (("kernel", True), ("gpu_memcpy", True), ("cpu_op", False)):
        assert parse_event({**event, "cat": cat}, on_gpu) == Interval("aten::mm", 3.0, 3.5, thread=7)
    for cat, on_gpu in (("cuda_runtime", True), ("gpu_user_annotation", True), ("cpu_op", True), ("kernel", False)):
        assert parse_event({**event, "cat": cat}, on_gpu) is None
    waiting = {**event, "cat": "cpu_op", "name": "Reduce"}
    assert parse_event(waiting, on_gpu=False) is None
    assert parse_event({**event, "ph": "M"}, on_gpu=False) is None
    gloo = {**event, "cat": "user_annotation", "name": "gloo:all_reduce"}
    assert parse_event(gloo, on_gpu=False) is not None


def test_only_the_work_counts() -> None:
    """What the ranks do to begin together is left out, on a GPU the head start too."""

    def event(cat: str, name: str, begin: float, end: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6, "tid": 7}

    def names(events: list[dict[str, Any]], on_gpu: bool) -> list[str]:
        return [interval.name for interval in parse_trace(events, on_gpu)]

    sleep = event("kernel", "at::cuda::(anonymous namespace)::spin_kernel(long)", 3, 5)
    mark = event("user_annotation", "measured work", 2, 9)
    kernels = [
        event("kernel", "ncclDevKernel_AllReduce_Max", 1, 2),
        event("gpu_memset", "Memset", 4, 4.5),
        event("kernel", "gemm", 5, 6),
        event("kernel", "all_reduce_spin", 5.5, 7),
    ]
    assert names([*kernels, sleep, mark], on_gpu=True) == ["gemm", "all_reduce_spin"]
    operators = [
        event("cpu_op", "aten::zeros", 0, 1),
        event("user_annotation", "gloo:all_reduce", 1, 2.5),
        event("cpu_op", "aten::mm", 2, 3),
        event("user_annotation", "gloo:all_reduce", 4, 5),
        event("user_annotation", "something else", 6, 7),
    ]
    metadata = {"ph": "M", "name": "process_name"}
    assert names([metadata, *operators, mark, sleep], on_gpu=False) == ["aten::mm", "gloo:all_reduce"]
    for events, on_gpu in (([*kernels, mark], True), ([*operators, sleep], False), ([], False)):
        with pytest.raises(ValueError, match="0 beginnings of the work"):
            parse_trace(events, on_gpu)


def test_real_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of the model around a simulated sum: everything that ran is found, and the sum's two halves."""
    sleeping, computed = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        """As long as the computation beside it, and a while longer."""
        sleeping.set()
        computed.wait()
        time.sleep(0.05)

    monkeypatch.setattr(link, "time", SimpleNamespace(perf_counter=time.perf_counter, sleep=sleep))
    communicator = SimulatedCommunicator(Interconnect("slow", 200_000.0, None, ""), ModelRank(0, 2), ThreadLink())
    x, weight = torch.randn(1, 256, 256), torch.randn(256, 256)
    query = torch.randn(1, 4, 256, 64)

    def work() -> None:
        sleeping.clear()
        computed.clear()
        pending = communicator.start_all_reduce(x)
        sleeping.wait()
        for _ in range(100):
            F.linear(x, weight)
        F.scaled_dot_product_attention(query, query, query, is_causal=True)
        F.layer_norm(x, (256,))
        computed.set()
        communicator.wait(pending)
        F.linear(x, weight)

    def before() -> None:
        x.cumsum(dim=0)
        computed.set()
        communicator.wait(communicator.start_all_reduce(x))

    with torch.inference_mode():
        work()
        intervals = record(work, torch.device("cpu"), before)
    assert not any("cumsum" in interval.name for interval in intervals)
    parts = break_down(intervals)
    assert all(parts[part] > 0 for part in (GEMM, ATTENTION, NORM, HEAD))
    (wire,) = [interval for interval in intervals if interval.name == "all_reduce_wire"]
    assert parts[HIDDEN] + parts[EXPOSED] == pytest.approx(wire.end - wire.start, rel=1e-6)
    assert parts[EXPOSED] >= 0.05
    beside = parts[GEMM] + parts[ATTENTION] + parts[NORM]
    assert beside * (1 - 1e-6) <= parts[HIDDEN] <= (beside + parts[OTHER]) * (1 + 1e-6)
    whole = max(i.end for i in intervals) - min(i.start for i in intervals)
    assert sum(parts[part] for part in PARTS) == pytest.approx(whole, rel=1e-6)
