"""Floating-point work of a model and the peak of a device: the two halves of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
import time

import torch

from kraken_train.model.architecture import ModelConfig

# Dense bf16 peak in TFLOP/s by a part of the device's name, from NVIDIA's data sheets.
BF16_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "V100": 15.7,  # has no bf16 units, so as in fp32
}
# Without TF32, fp32 matrix products run on the ordinary cores.
FP32_PEAK_TFLOPS = {
    "GB200": 80.0,
    "B200": 80.0,
    "H200 NVL": 60.0,
    "H200": 67.0,
    "H100 PCIe": 51.0,
    "H100 NVL": 60.0,
    "H100": 67.0,
    "A100": 19.5,
    "L40S": 91.6,
    "A10": 31.2,
    "V100": 15.7,
}


def training_flops_per_token(model: ModelConfig, attended: float | None = None) -> float:
    """Floating-point operations to train on one token: forward and backward, matrices and causal attention.

    `attended` as in `attention_flops_per_token`. Recomputation by activation checkpointing is not counted.
    """
    return matrix_flops_per_token(model) + attention_flops_per_token(model, attended)


def forward_flops_per_token(model: ModelConfig, attended: float | None = None) -> float:
    """The same for the forward pass alone, as of a teacher: a third."""
    return training_flops_per_token(model, attended) / 3


def matrix_flops_per_token(model: ModelConfig) -> float:
    """6 per matrix parameter: a multiplication and an addition, forward and twice backward (PaLM, appendix B)."""
    return 6.0 * model.matrix_parameters


def attention_flops_per_token(model: ModelConfig, attended: float | None = None) -> float:
    """6 T w per layer for the scores and their weighted sum, w being the width of all heads.

    12 T w without a mask (PaLM, appendix B), of which the causal mask leaves half: a token attends to T / 2 others in
    the mean, or to `attended`, where documents are apart. Kraken's heads together are wider
    than those of the standard Transformer that it matches, so comparisons list this separately.
    """
    others = model.context_length / 2 if attended is None else attended
    return 12.0 * model.num_layers * others * model.attention_width


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one device in this precision; None for a GPU that is not in the table.

    A CPU has no usable figure, so its peak is measured with a large matrix product (about 0.3 s).
    """
    if device.type == "cuda":
        table = BF16_PEAK_TFLOPS if precision == "bf16" else FP32_PEAK_TFLOPS
        name = torch.cuda.get_device_name(device)
        return next((tflops * 1e12 for part, tflops in table.items() if re.search(rf"\b{part}\b", name)), None)
    size = 1024
    a = torch.randn(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    a @ a
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
