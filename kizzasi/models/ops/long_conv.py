"""Causal convolution with a filter as long as the sequence, through the FFT.

b batch · t time · c channels · k filter length

The definition is `causal_conv1d_ref` of ops/conv.py, and one token is its `causal_conv1d_step`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.conv import causal_conv1d_ref
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.s4 import convolve, last_document


def long_conv1d_ref(
    x: Tensor, weight: Tensor, state: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: `causal_conv1d_ref`, tap by tap."""
    return causal_conv1d_ref(x, weight, None, state, starts)


def long_conv1d(
    x: Tensor, weight: Tensor, state: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_ref` without bias in O(t log t), or O((t + k) log(t + k)) after a state.

        y[t] = sum_j weight[j] x[t - (k-1) + j],     j = 0 .. k-1

    Args:
        x: (b, t, c) input, t >= 1.
        weight: (c, k) filters, the newest token last.
        state: (b, c, k-1) the inputs before x, the newest last; None for zeros.
        starts: (b, t) bool, True where a document starts; documents are convolved one by one, so
            nothing leaks from one to the next, not even a rounding error.

    Returns:
        y (b, t, c), and the state (b, c, k-1) after the last token, both in x's dtype.
    """
    (b, t, c), before = x.shape, weight.shape[1] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    kernel = weight.to(wide).flip(1)
    history = x.new_zeros(b, before, c) if state is None else state.mT.to(x.dtype)
    every = torch.cat([history, x], 1)
    begins = None if starts is None else F.pad(starts, (before, 0))
    seen, _ = last_document(every, None, begins)
    if state is None:  # no need to convolve zeros
        every, begins = x, starts
    y = convolve(every.to(wide), kernel, None, begins)
    return y[:, -t:].to(x.dtype), seen[:, t:].mT.contiguous()


LONG_CONV1D = Engines("long_conv1d", reference=long_conv1d_ref, torch=long_conv1d)
