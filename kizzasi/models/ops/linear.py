"""The products of linear layers.

y = x W^T + bias

torch   whatever library torch calls: on a CPU it is MKL, which keeps to AVX2 on processors that
        are not Intel's.
native  oneDNN, which comes with torch as well and uses AVX-512 wherever it is: half the time.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.engines import Engines


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., i), weight (o, i), bias (o,) to y (..., o), without a matrix product."""
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_ref`, as torch does it."""
    return F.linear(x, weight, bias)


LINEAR = Engines(
    "linear",
    reference=linear_ref,
    torch=linear,
    native="kizzasi.models.ops.native.linear:linear",
)
