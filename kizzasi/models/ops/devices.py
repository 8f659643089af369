"""Where an op runs, as its rule asks: tests answer for devices that they do not have."""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.models.ops.autodiff import transformed


def on_cpu(x: Tensor) -> bool:
    """A call costs little, and memory much."""
    return x.is_cpu


def on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def eager() -> bool:
    """Values exist now: neither a compiler nor torch.func stands in between."""
    return not (torch.compiler.is_compiling() or transformed())


def answers(x: Tensor) -> bool:
    """A value of x may be asked for, and costs no wait."""
    return eager() and on_cpu(x)
