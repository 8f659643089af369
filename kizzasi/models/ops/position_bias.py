"""What positions add to the scores of attention: by fixed slopes, or by buckets of distances.

    distance  position of the query minus that of the key

Source: ALiBi: Press et al. 2021, arXiv:2108.12409. Buckets: T5, Raffel et al. 2019,
arXiv:1910.10683, section 2.1; where their borders lie, its published code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kizzasi.models.ops.attention import alibi_slopes


def alibi_bias(distance: Tensor, n_heads: int, dtype: torch.dtype) -> Tensor:
    """(b, n_heads, t, s) of distances (b, t, s): -slope |distance|."""
    slopes = alibi_slopes(n_heads, device=distance.device, dtype=dtype)
    return -slopes[:, None, None] * distance.abs()[:, None]


def distance_bucket(
    distance: Tensor, n_buckets: int, max_distance: int, causal: bool = True
) -> Tensor:
    """(b, t, s) int64: which bucket a distance falls into.

    The first half of the buckets holds one distance each, the others grow like powers up to
    max_distance; all beyond share the last.

    Args:
        distance: (b, t, s) integers; below 0 with `causal` means 0.
        causal: if False, half of the buckets are for keys that come later.
    """
    n, later = n_buckets, torch.zeros_like(distance)
    if not causal:
        n = n_buckets // 2
        later = (distance < 0).long() * n
    far = distance.clamp(min=0) if causal else distance.abs()
    exact = n // 2
    ratio = (far.clamp(min=1).double() / exact).log() / math.log(max_distance / exact)
    coarse = (exact + (ratio * (n - exact)).floor().long()).clamp(max=n - 1)
    return later + torch.where(far < exact, far, coarse)
