"""What RWKV-7 makes of its projections before `wkv7`: decays, keys and what they remove.

d d_model · h heads · n channels of a head

Source: Peng et al. 2025, arXiv:2503.14456, section 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kizzasi.models.ops.precision import in_full_precision

MAX_DECAY = math.exp(-0.5)  # a memory fades by at most exp(-MAX_DECAY) per token


class Streams(NamedTuple):
    """The inputs of `wkv7`, each (..., h, n)."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


@in_full_precision
def wkv7_streams(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    n: int,
) -> Streams:
    """The inputs of `wkv7`, in at least float32.

        log decay     -exp(-0.5) sigmoid(w0 + w)
        rate          sigmoid(a0 + rate), of learning in context
        removal key   k k_k, of length 1
        written key   k (1 + (rate - 1) k_a)

    Args:
        r, k, v: (..., d) projections.
        w, rate: (..., d) what low-rank maps add to w0 and a0.
        w0, a0, k_k, k_a: (d,).
        n: channels of a head, a divisor of d.
    """
    w, rate = -MAX_DECAY * (w0 + w).sigmoid(), (a0 + rate).sigmoid()
    removal = (k * k_k).unflatten(-1, (-1, n))
    length = torch.linalg.vector_norm(removal, dim=-1, keepdim=True)
    removal = removal / length.clamp_min(1e-12)
    k = k * torch.addcmul(1.0 - k_a, rate, k_a)
    r, w, k, v, rate = (x.unflatten(-1, (-1, n)) for x in (r, w, k, v, rate))
    return Streams(r, w, k, v, -removal, removal * rate)


@in_full_precision
def mixed_value(v: Tensor, v_first: Tensor, v0: Tensor, more: Tensor) -> Tensor:
    """v + sigmoid(v0 + more) (v_first - v): (..., d) of the first layer's value and one's own."""
    return torch.lerp(v, v_first, (v0 + more).sigmoid())
