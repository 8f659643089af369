"""Noise that is a function of where it falls: the same in every form, call and process."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
APART = 0x9E3779B9  # no channel hashes like a position


def noise_of(seed: int, position: Tensor, d: int, bound: float = 3.0) -> Tensor:
    """Standard normal numbers, cut at +-bound, one for every position and channel.

        z = sqrt(2) erfinv(2 u - 1),    u = (hash(seed, position, channel) + 1/2) / 2^32

    Args:
        seed: any integer.
        position: (b, t) int64, not negative.
        d: channels.

    Returns:
        (b, t, d) float64.
    """
    u = uniform_of(seed, position, d)
    return (math.sqrt(2) * torch.erfinv(2 * u - 1)).clamp(-bound, bound)


def uniform_of(seed: int, position: Tensor, d: int, key: Tensor | None = None) -> Tensor:
    """Numbers in (0, 1), one for every position and channel.

    Args:
        seed: any integer.
        position: (b, t) int64, not negative.
        d: channels.
        key: (b,) int64, a further seed for every row; None means 0.

    Returns:
        (b, t, d) float64.
    """
    channel = torch.arange(d, device=position.device) + APART
    place = _mix(position + (seed & MASK))
    if key is not None:
        place = _mix(place ^ _mix(key)[:, None])
    return (_mix(place.unsqueeze(-1) + _mix(channel)).double() + 0.5) / 2**32


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, in int64, whose every output bit depends on every input bit.

    Source: C. Wellons, hash-prospector, "lowbias32" (the constants are public domain).
    """
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
