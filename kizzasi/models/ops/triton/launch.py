"""What the kernels' callers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

STEPS = 16  # tokens between two memories that forward writes down for backward


def rows(x: Tensor) -> Tensor:
    """x, whose last dimension is contiguous: kernels take strides of the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def differentiable(*inputs: Tensor | None) -> bool:
    """Whether somebody may ask for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def run(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Run a kernel, whose first argument is a tensor, where that one is."""
    first: Tensor = given[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*given, **options)


def blocks(width: int, size: int) -> int:
    """How many blocks of a size cover a width."""
    return -(-width // size)


def padded(width: int) -> int:
    return 1 << (width - 1).bit_length()


def block(width: int, most: int, least: int = 1) -> int:
    """Channels of one program; a matrix product takes 16 or more."""
    return max(min(padded(width), padded(most)), least)


def precision(dtype: torch.dtype, low: bool) -> str:
    """How numbers enter a matrix product. float64 as it is; float32 as three parts of TF32, which
    together keep its digits, or as one where `low`, or where the program allows bfloat16 by
    `torch.set_float32_matmul_precision("medium")`."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32" if low or torch.get_float32_matmul_precision() == "medium" else "tf32x3"


def strides(*inputs: Tensor) -> Iterator[int]:
    """Of all dimensions but the last; 0 where there is one of something, to be read again."""
    for x in inputs:
        yield from (0 if x.shape[i] == 1 else x.stride(i) for i in range(x.ndim - 1))
