"""The time of a prefill by operator, from a profile.

A profile is a list of intervals. On a GPU these are kernels, known by their names; on the CPU PyTorch's operators,
which contain each other, and the outermost one that is known counts. A collective is hidden while anything computes
and exposed for the rest of its time.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile, record_function

GEMM, ATTENTION, NORM, HEAD, OTHER = "gemm", "attention", "norm", "head", "other"
EXPOSED, HIDDEN, IDLE = "exposed_all_reduce", "hidden_all_reduce", "idle"
PARTS = (GEMM, ATTENTION, NORM, OTHER, HEAD, EXPOSED, IDLE)  # these add up to the whole time; HIDDEN is beside them

ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"  # of intervals

# The first that matches counts: attention kernels have "cutlass" in their template arguments too.
KINDS = (
    (ALL_GATHER, r"all_gather_(spin|wire)|nccl.*allgather|gloo:.*all_?gather"),
    (ALL_REDUCE, r"all_reduce_(spin|wire|kernel)|nccl|gloo:.*all_?reduce"),
    (ATTENTION, r"flash|fmha|sdpa|attention"),
    (NORM, r"layer_?norm|rms_?norm|(layer|ffn)_entry"),
    (GEMM, r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|triton_\w*mm|aten::(linear|addmm|mm|bmm|baddbmm|matmul)$"),
)
# Inductor's own loops are named after all that was fused into them, products' bias and attention's copies included.
FUSED_LOOP = r"triton_(poi|per|red)_"
FUSED_NORM = r"layer_?norm|rms_?norm|var_mean|rsqrt"


@dataclass(frozen=True)
class Interval:
    """Something that ran, in seconds of any clock. Intervals of one thread (or stream) may contain each other."""

    name: str
    start: float
    end: float
    thread: int = 0

    @property
    def kind(self) -> str | None:
        """GEMM, ATTENTION, NORM, ALL_REDUCE or ALL_GATHER, if the name says so."""
        lowered = self.name.lower()
        if re.match(FUSED_LOOP, lowered):
            return NORM if re.search(FUSED_NORM, lowered) else None
        return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), None)


Spans = list[tuple[float, float]]  # disjoint, in order


def break_down(intervals: Iterable[Interval]) -> dict[str, float]:
    """Seconds by operator: `PARTS`, which add up to the time from the first start to the last end, and HIDDEN.

    The head is what is multiplied after the last all-reduce (every architecture sums once more before its final norm
    and head) with the exposed time of joining the logits. Raises ValueError for an empty profile.
    """
    known = outermost(intervals)
    if not known:
        raise ValueError("the profile is empty; with KINETO_LOG_LEVEL=0 the profiler says why")
    by_kind = {kind: [i for i in known if i.kind == kind] for kind in (GEMM, ATTENTION, NORM, ALL_REDUCE, ALL_GATHER)}
    computing = union(i for i in known if i.kind not in (ALL_REDUCE, ALL_GATHER))
    reducing, gathering = union(by_kind[ALL_REDUCE]), union(by_kind[ALL_GATHER])
    hidden = overlap(reducing, computing)
    # Without collectives the head is the last product.
    starts = [reducing[-1][1]] if reducing else [i.start for i in by_kind[GEMM]][-1:]
    head = [i for i in by_kind[GEMM] if starts and i.start >= starts[0]]
    seconds = {
        GEMM: total(by_kind[GEMM]) - total(head),
        ATTENTION: total(by_kind[ATTENTION]),
        NORM: total(by_kind[NORM]),
        HEAD: total(head) + length(gathering) - overlap(gathering, computing),
        EXPOSED: length(reducing) - hidden,
        HIDDEN: hidden,
    }
    seconds[OTHER] = max(0.0, length(computing) - sum(total(by_kind[kind]) for kind in (GEMM, ATTENTION, NORM)))
    whole = max(i.end for i in known) - min(i.start for i in known)
    seconds[IDLE] = whole - length(union(known))
    return seconds


def outermost(intervals: Iterable[Interval]) -> list[Interval]:
    """The intervals without those inside one of a known kind of the same thread, in the order of their starts."""
    kept: list[Interval] = []
    covered: dict[int, float] = {}  # thread -> end of its last interval of a known kind
    for interval in sorted(intervals, key=lambda i: (i.start, -i.end)):
        if interval.end <= covered.get(interval.thread, float("-inf")):
            continue
        if interval.kind is not None:
            covered[interval.thread] = interval.end
        kept.append(interval)
    return kept


def union(intervals: Iterable[Interval]) -> Spans:
    spans: Spans = []
    for start, end in sorted((i.start, i.end) for i in intervals):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def overlap(left: Spans, right: Spans) -> float:
    """Seconds that are in both."""
    seconds, a, b = 0.0, 0, 0
    while a < len(left) and b < len(right):
        seconds += max(0.0, min(left[a][1], right[b][1]) - max(left[a][0], right[b][0]))
        if left[a][1] < right[b][1]:
            a += 1
        else:
            b += 1
    return seconds


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def total(intervals: Iterable[Interval]) -> float:
    return sum(i.end - i.start for i in intervals)


# ---------------------------------------------------------------------------------------------------------------
# Profiling
# ---------------------------------------------------------------------------------------------------------------

GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_COMPUTATIONS = ("aten::", "## Call CompiledFxGraph")
# Before the work a GPU is kept busy, so that the work's first launches cost it nothing. Of its clock, about 2 ms: the
# launch of a CUDA graph of several streams can take longer than 0.2 ms.
HEAD_START_CYCLES = 4_000_000
HEAD_START_KERNEL = "spin_kernel"  # of torch.cuda._sleep; a simulated collective is an all_..._spin
WORK = "measured work"  # marks its beginning on the CPU


def record(
    work: Callable[[], object], device: torch.device, before: Callable[[], object] = lambda: None
) -> list[Interval]:
    """What ran on `device` during `work`, without what `before` did, which comes first but after the profiler's start.

    Raises ValueError where the profile lacks the work's beginning.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    # A link on the CPU is a thread of its own.
    every_thread = _ExperimentalConfig(profile_all_threads=not on_gpu)
    with profile(activities=[activity], experimental_config=every_thread) as profiler:
        before()
        if on_gpu:
            torch.cuda._sleep(HEAD_START_CYCLES)
        with record_function(WORK):
            work()
        if on_gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return parse_trace(events, on_gpu)


def parse_trace(events: Sequence[dict[str, Any]], on_gpu: bool) -> list[Interval]:
    """What started once the work had begun: on a GPU at the end of the head start, on the CPU at its mark."""
    if on_gpu:
        kernels = (event for event in events if event.get("cat") == "kernel" and HEAD_START_KERNEL in event["name"])
        begins = [event["ts"] + event["dur"] for event in kernels]
    else:
        marks = (event for event in events if event.get("cat") == "user_annotation" and event["name"] == WORK)
        begins = [event["ts"] for event in marks]
    if len(begins) != 1:
        raise ValueError(
            f"the profile has {len(begins)} beginnings of the work instead of one; with KINETO_LOG_LEVEL=0 the "
            "profiler says why"
        )
    intervals = (parse_event(event, on_gpu) for event in events if event.get("ts", begins[0]) >= begins[0])
    return [interval for interval in intervals if interval is not None]


def parse_event(event: dict[str, Any], on_gpu: bool) -> Interval | None:
    """An event of Chrome's trace format; times there are in microseconds."""
    if event.get("ph") != "X":
        return None
    interval = Interval(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6, hash(event["tid"]))
    if on_gpu:
        return interval if event.get("cat") in GPU_EVENTS else None
    # Others are as long as what they are about, and some of them only wait.
    computing = event.get("cat") == "cpu_op" and event["name"].startswith(CPU_COMPUTATIONS)
    return interval if computing or interval.kind in (ALL_REDUCE, ALL_GATHER) else None
