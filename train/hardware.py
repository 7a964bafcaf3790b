"""What accelerators can do at best, to set what a run does against it."""

from collections.abc import Mapping

import jax

PEAK_FLOPS: Mapping[str, float] = {
    # Dense bfloat16 operations a second of one JAX device, as its maker publishes them.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # half a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Return the bfloat16 operations a second of a device at best, or `None` when it is not in the table."""
    kind = device.device_kind
    known = [name for name in PEAK_FLOPS if kind == name or kind.startswith((f"{name} ", f"{name}-"))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def memory_in_use(device: jax.Device) -> int | None:
    """Return the most bytes that were in use on a device so far, or `None` where the platform does not tell."""
    statistics = device.memory_stats() or {}
    return statistics.get("peak_bytes_in_use")
