"""What the kernels' callers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

STEPS = 16  # tokens between two memories that forward writes down for backward


def rows(x: Tensor) -> Tensor:
    """x, whose last dimension is contiguous: kernels take strides of the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def differentiable(*inputs: Tensor | None) -> bool:
    """Whether somebody may ask for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def on(x: Tensor) -> AbstractContextManager[object]:
    """Kernels run on the current device: make it the one of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def padded(width: int) -> int:
    return triton.next_power_of_2(width)


def block(width: int, most: int) -> int:
    """Channels of one program."""
    return min(padded(width), most)


def strides(*inputs: Tensor) -> Iterator[int]:
    """Of all dimensions but the last; 0 where there is one of something, to be read again."""
    for x in inputs:
        yield from (0 if x.shape[i] == 1 else x.stride(i) for i in range(x.ndim - 1))
