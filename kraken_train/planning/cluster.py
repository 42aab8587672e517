"""The performance of a cluster: one file of `conf/cluster`, or this machine, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
import yaml
from torch.nn import functional as F

from kraken_train.common.cli import CONF_DIR
from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least, require_choice, require_positive
from kraken_train.model.flops import BF16_PEAK_TFLOPS, FP32_PEAK_TFLOPS, device_peak_flops
from kraken_train.planning.interconnect import Interconnect

THIS = "this"  # the file of conf/cluster whose null values are measured on this machine
INTERCONNECTS = tuple(sorted(path.stem for path in (CONF_DIR / "interconnect").glob("*.yaml")))


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. What is null in the file of `this` is measured by `measured`."""

    name: str  # file of conf/cluster
    # name of the device, whose peak kraken_train.model.flops has; null: bf16_tflops and fp32_tflops give the peak
    device: str | None
    devices_per_node: int | None  # devices of a machine; null: those of this one
    memory_gb: float | None  # memory of a device, in GB (1e9 bytes); null: measured
    reserved_gb: float  # memory that PyTorch's tensors cannot use: context, workspaces, communication, fragmentation
    bandwidth_gb: float | None  # memory bandwidth of a device by its data sheet, in GB/s; null: measured
    intra_node: str  # file of conf/interconnect, within a machine
    inter_node: str  # file of conf/interconnect, between machines, for each device
    matrix_fraction: float  # of the peak: what large products of well-aligned matrices reach
    rows_of_16_bytes: float  # of matrix_fraction: where the rows of a matrix are multiples of 16 bytes but not of 128
    other_rows: float  # of matrix_fraction: where the rows are not multiples of 16 bytes
    # of the peak: what fused causal attention reaches, forward and backward; null: measured
    attention_fraction: float | None
    wide_head_fraction: float  # of attention_fraction: with heads of more than 128
    bandwidth_fraction: float  # of the bandwidth: what element-wise operations reach
    source: str  # where the figures are from
    bf16_tflops: float | None = None  # peak in bf16; null: from the table, or measured
    fp32_tflops: float | None = None  # peak in fp32; null: from the table, or measured

    def validate(self) -> None:
        """Raises ConfigError."""
        if self.device is not None:
            require_choice("cluster.device", self.device, tuple(BF16_PEAK_TFLOPS))
        for name in ("devices_per_node", "memory_gb", "bandwidth_gb", "bf16_tflops", "fp32_tflops"):
            if getattr(self, name) is not None:
                require_positive(f"cluster.{name}", getattr(self, name))
        require_at_least("cluster.reserved_gb", self.reserved_gb, 0)
        for name in ("intra_node", "inter_node"):
            require_choice(f"cluster.{name}", getattr(self, name), INTERCONNECTS)
        fractions = [name for name in self.__dataclass_fields__ if name.endswith("_fraction")]
        for name in (*fractions, "rows_of_16_bytes", "other_rows"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"cluster.{name}={value} must be greater than 0 and at most 1: it is a fraction")

    @property
    def usable_bytes(self) -> int:
        """Bytes of a device for tensors."""
        return int((known("memory_gb", self.memory_gb) - self.reserved_gb) * 1e9)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that element-wise operations read and write."""
        return known("bandwidth_gb", self.bandwidth_gb) * 1e9 * self.bandwidth_fraction

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of a device."""
        given = self.bf16_tflops if precision == "bf16" else self.fp32_tflops
        if given is None and self.device is not None:
            given = (BF16_PEAK_TFLOPS if precision == "bf16" else FP32_PEAK_TFLOPS)[self.device]
        return known(f"{precision}_tflops", given) * 1e12

    @property
    def faster_precision(self) -> str:
        """What `precision=auto` chooses here: bf16 where its peak is higher, so where the devices have units for it."""
        return "bf16" if self.peak_flops("bf16") > self.peak_flops("fp32") else "fp32"

    def interconnect(self, ranks: int, stride: int) -> Interconnect:
        """What connects a group of `ranks` devices that are `stride` apart.

        Between nodes each device has a link of its own, so the bandwidth of a group grows with its members in a node.
        """
        per_node = int(known("devices_per_node", self.devices_per_node))
        within = load_interconnect(self.intra_node)
        if ranks * stride <= per_node:
            return within
        between = load_interconnect(self.inter_node)
        if between.bus_bandwidth is None:
            return between
        bandwidth = between.bus_bandwidth * max(1, per_node // stride)
        if within.bus_bandwidth is not None:
            bandwidth = min(bandwidth, within.bus_bandwidth)
        return replace(between, bus_bandwidth=bandwidth)


def known(name: str, value: float | None) -> float:
    """Raises ConfigError where the profile has no value."""
    if value is None:
        raise ConfigError(f"cluster.{name} is not set; give cluster.{name}=NUMBER")
    return value


def load_interconnect(name: str) -> Interconnect:
    return Interconnect(**yaml.safe_load((CONF_DIR / "interconnect" / f"{name}.yaml").read_text(encoding="utf-8")))


def load_cluster(name: str) -> Cluster:
    """A file of `conf/cluster`, measured where that is `this`. Raises ConfigError."""
    names = tuple(sorted(path.stem for path in (CONF_DIR / "cluster").glob("*.yaml")))
    require_choice("cluster", name, names)
    cluster = Cluster(**yaml.safe_load((CONF_DIR / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")))
    cluster.validate()
    return measured(cluster) if cluster.name == THIS else cluster


def measured(cluster: Cluster) -> Cluster:
    """The profile with its null values measured on the device of this process, GPU or CPU; takes about two seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tflops: dict[str, float] = {}
    for precision in ("bf16", "fp32"):
        given, peak = getattr(cluster, f"{precision}_tflops"), device_peak_flops(device, precision)
        if given is None and peak is None:
            raise ConfigError(
                f"the peak of {torch.cuda.get_device_name(device)} is not known; give cluster.{precision}_tflops=NUMBER"
            )
        tflops[precision] = (peak or 0.0) / 1e12 if given is None else given
    fallback: dict[str, Callable[[], Any]] = {
        "devices_per_node": lambda: torch.cuda.device_count() if device.type == "cuda" else 1,
        "memory_gb": lambda: device_memory(device) / 1e9,
        "bandwidth_gb": lambda: copy_bandwidth(device) / 1e9,
        "bf16_tflops": lambda: tflops["bf16"],
        "fp32_tflops": lambda: tflops["fp32"],
        "attention_fraction": lambda: min(1.0, attention_flops(device) / (tflops["bf16"] * 1e12)),
    }
    return replace(cluster, **{name: find() for name, find in fallback.items() if getattr(cluster, name) is None})


def device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, reading and writing, of copies that no cache holds."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def attention_flops(device: torch.device) -> float:
    """FLOP/s of causal attention, forward and backward: 4 products of a triangle forward and 10 backward."""
    rows, heads, tokens, width = (8, 16, 1024, 64) if device.type == "cuda" else (2, 4, 256, 64)
    shape = (rows, heads, tokens, width)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))

    def attend() -> None:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(mixed, (query, key, value), torch.ones_like(mixed))

    return 7 * rows * heads * tokens**2 * width / best_seconds(attend, device)


def best_seconds(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    best = float("inf")
    for _ in range(rounds + 1):  # the first warms up
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
