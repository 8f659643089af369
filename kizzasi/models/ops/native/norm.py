"""`rms_norm` in C, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import norm as torch_form
from kizzasi.models.ops.native import library


def rms_norm(x: Tensor, weight: Tensor, eps: float, eps0: Tensor) -> Tensor:
    """`rms_norm_ref`. Further derivatives are those of the torch form."""
    if library.differentiable(x, weight):
        return _Norm.apply(x, weight, eps, eps0)
    return _forward(x, weight, eps0)


def _rows(x: Tensor) -> Tensor:
    """(rows, d), one stride apart; a view if that can be."""
    return library.rows(x.reshape(-1, x.shape[-1]))


def _sizes(x: Tensor, dy: Tensor) -> list[int]:
    return [*x.shape, x.stride(0), dy.stride(0), library.threads(4 * x.numel())]


def _forward(x: Tensor, weight: Tensor, eps0: Tensor) -> Tensor:
    rows, weight, y = _rows(x), weight.contiguous(), x.new_empty(x.shape)
    library.call("norm_forward", x.dtype, [rows, weight, eps0, y], *_sizes(rows, rows))
    return y


class _Norm(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, eps: float, eps0: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, eps0)
        ctx.eps = eps
        return _forward(x, weight, eps0)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, eps0 = ctx.saved_tensors
        if autodiff.too_narrow(dy):
            return autodiff.gradients(torch_form.rms_norm, (x, weight, ctx.eps, eps0), (dy,))
        rows, dy, dx = _rows(x), _rows(dy), x.new_empty(x.shape)
        sizes = _sizes(rows, dy)
        (parts,) = library.ask("norm_sizes", x.dtype, 1, *sizes)
        dweight = x.new_empty(parts, x.shape[-1])
        given = [rows, weight.contiguous(), eps0, dy, dx, dweight]
        library.call("norm_backward", x.dtype, given, *sizes)
        return dx, dweight.sum(0), None, None
