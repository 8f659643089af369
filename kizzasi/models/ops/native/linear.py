"""`linear` by oneDNN. Importing this fails where it would gain nothing: see `USEFUL`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops.native import library

# The rule: AVX-512 that MKL does not use.
USEFUL = (
    library.AVAILABLE[-1] == "avx512"
    and not library.of_intel()
    and torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
)
if not USEFUL:
    raise ImportError("torch's own products are the fastest here")
WORTH_IT = 2**21  # multiply-adds below which a call of oneDNN costs more than it saves
_product = torch.ops.mkldnn._linear_pointwise


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_ref`. Small products, other dtypes, what autocast lowers and further derivatives are
    torch's."""
    plain = x.dtype == weight.dtype == torch.float32 and x.numel() * len(weight) >= WORTH_IT
    if not plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if library.differentiable(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return _times(x, weight, bias)


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias; both may be transposed."""
    return _product(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _times(x, weight, bias)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if autodiff.too_narrow(dy):
            return autodiff.gradients(F.linear, (x, weight, bias), (dy,))
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dy_rows, x_rows = dy.flatten(0, -2), x.flatten(0, -2)
        dx = _times(dy, weight.t()) if of_x else None
        dweight = _times(dy_rows.t(), x_rows.t()) if of_weight else None
        return dx, dweight, dy_rows.sum(0) if of_bias else None
