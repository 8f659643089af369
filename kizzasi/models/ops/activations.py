"""Elementwise functions by the names that specs give them.

Sources: GELU, Hendrycks & Gimpel 2016, arXiv:1606.08415. Squared ReLU, So et al. 2021,
arXiv:2109.08668. Of gates: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.precision import full_precision

Activation = Literal["gelu", "gelu_quick", "gelu_tanh", "relu", "relu2", "sigmoid", "silu"]


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2"""
    return F.relu(x).square()


def gelu_quick(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the sigmoid form of GELU's own paper."""
    return x * torch.sigmoid(1.702 * x)


def silu_gated(y: Tensor, z: Tensor) -> Tensor:
    """y silu(z), computed in at least float32 and given in z's dtype."""
    return (y * F.silu(full_precision(z))).to(z.dtype)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_quick": gelu_quick,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
