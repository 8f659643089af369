"""RMS norm over the last dimension.

    y = w x / sqrt(mean(x^2) + eps)

x (..., d) · w (d,) · eps a number, and as eps0 a float64 tensor of no dimension on the CPU, which
operations take with any dtype, as they take a number
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.engines import Engines


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, eps0: Tensor) -> Tensor:
    """The definition. x and weight have one dtype, float32 or float64; so has the result."""
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(x: Tensor, weight: Tensor, eps: float, eps0: Tensor) -> Tensor:
    """`rms_norm_ref`, by torch's kernel; a CPU has none, and would run eight small ones instead of
    these five."""
    if not x.is_cpu:
        return F.rms_norm(x, weight.shape, weight, eps)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps0, size, size, value=1 / x.shape[-1]).rsqrt()
    return x * weight * scale


RMS_NORM = Engines(
    "rms_norm",
    reference=rms_norm_ref,
    torch=rms_norm,
    native="kizzasi.models.ops.native.norm:rms_norm",
)
