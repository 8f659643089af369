"""Where an op runs, as its rule asks: tests answer for devices that they do not have."""

from __future__ import annotations

from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """A call costs little and memory much, and a value can be asked for without waiting."""
    return x.is_cpu


def on_cuda(x: Tensor) -> bool:
    return x.is_cuda
