"""What devices can do at best, for model FLOP utilisation."""

from __future__ import annotations

import re

# Dense bf16 tensor-core peak in FLOP/s with float32 accumulation, without sparsity, from NVIDIA's data sheets; the longest name
# that a device's kind contains counts.
BF16_PEAK_FLOPS = {
    "A100": 312e12,
    "A10G": 70e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2450e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


def runs_triton(platform: str, compute_capability: str = "") -> bool:
    """Whether kernels in Triton can be compiled for a device: for NVIDIA's from Ampere on.

    Args:
        platform: "cpu", "gpu", "cuda", "rocm" as `jax.Device.platform` and `jax.default_backend` name it.
        compute_capability: "9.0" for Hopper; empty where it is not known, and taken to be new.

    >>> runs_triton("gpu", "7.0"), runs_triton("cuda", "9.0"), runs_triton("gpu"), runs_triton("rocm"), runs_triton("cpu")
    (False, True, True, False, False)
    """
    return platform in ("gpu", "cuda") and float(compute_capability or "8.0") >= 8.0


def bf16_peak(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known.

    >>> bf16_peak("NVIDIA H100 80GB HBM3")
    989000000000000.0
    >>> bf16_peak("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    """
    known = [name for name in BF16_PEAK_FLOPS if re.search(rf"\b{name}\b", device_kind)]
    return BF16_PEAK_FLOPS[max(known, key=len)] if known else None
