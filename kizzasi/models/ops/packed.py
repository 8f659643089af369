"""Products with weights in levels of 4 or 8 bits.

    w = scale level + minimum        a scale and a minimum for every 32 inputs

Symbols: n outputs, k inputs, r rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.engines import Engines

GROUP = 32  # inputs that share a scale


class Packed(NamedTuple):
    """A matrix (n, k).

    codes          (n, k / 32, 32) int8 levels; or (n, k / 32, 16) uint8 of two levels each, 0 to
                   15: level j of the group and, 16 times, level j + 16.
    scale, minimum  (n, k / 32) float32.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor


def pack(level: Tensor, scale: Tensor, minimum: Tensor | None) -> Packed:
    """Of levels (n, k / 32, 32) int8, scale and minimum (n, k / 32, 1), None for zero: four bits
    where they reach no further than 16 levels, eight else."""
    scale = scale.float().squeeze(-1)
    minimum = torch.zeros_like(scale) if minimum is None else minimum.float().squeeze(-1)
    low, high = (int(end) for end in level.aminmax())
    if low < -8 or high > 15 or (low < 0 and high > 7):
        return Packed(level.contiguous(), scale.contiguous(), minimum.contiguous())
    if low < 0:
        level, minimum = level + 8, minimum - 8 * scale
    first, second = level.to(torch.uint8).chunk(2, -1)
    return Packed((first | second << 4).contiguous(), scale.contiguous(), minimum.contiguous())


def unpack(weight: Packed) -> Tensor:
    """(n, k) float32."""
    codes = weight.codes
    if codes.dtype == torch.uint8:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    return (codes.float() * weight.scale[..., None] + weight.minimum[..., None]).flatten(1)


def packed_linear_ref(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x (r, k) float32 and bias (n,) to W x + bias (r, n)."""
    return F.linear(x, unpack(weight), bias)


PACKED_LINEAR = Engines(
    "packed_linear",
    reference=packed_linear_ref,
    torch=packed_linear_ref,
    native="kizzasi.models.ops.native.packed:packed_linear",
)
