"""`packed_linear` in C, for few rows; packed.c says how."""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.models.ops.native import library
from kizzasi.models.ops.packed import Packed, packed_linear_ref

MANY = 32  # rows from which on it pays to open the weights and leave the product to BLAS
WORTH_A_THREAD = 2**20  # weights


def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`packed_linear_ref`; many rows and gradients are its own."""
    if len(x) > MANY or library.differentiable(x, bias):
        return packed_linear_ref(x, weight, bias)
    x, (n, groups) = library.rows(x), weight.scale.shape
    y, sums = x.new_empty(len(x), n), x.new_empty(len(x), groups)
    sizes = len(x), *packed_sizes(x, weight, y)
    library.call("packed", torch.float32, [x, *weight, bias, y, sums], *sizes)
    return y


def packed_sizes(x: Tensor, weight: Packed, y: Tensor) -> tuple[int, ...]:
    """What the kernel is told, but for the number of rows."""
    n, k = len(weight.scale), x.shape[1]
    bits = 4 if weight.codes.dtype == torch.uint8 else 8
    threads = max(1, min(torch.get_num_threads(), n * k // WORTH_A_THREAD))
    return n, k, x.stride(0), y.stride(0), bits, threads
