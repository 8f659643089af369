"""sLSTM: scalar cells with exponential gates, whose gates also see the last output.

Symbols: b batch, t time, h heads, n cells of a head; z, i, f, o the cell's input and its gates.

| here | paper | meaning |
|---|---|---|
| x (b,t,4,h,n) | W x + b | what the gates take from the token: z, i, f, o before their functions |
| R (4,h,n,n) | R | what they take from a head's last outputs, [gate, head, in, out] |
| y, c, n, m (b,h,n) | h, c, n, m | output, cell, normaliser, logarithm that divides c and n |

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import full_precision


class SLSTMMemory(NamedTuple):
    """y, c, n and m, each (b, h, n); all zero before any token."""

    y: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


def slstm_ref(
    x: Tensor, R: Tensor, memory: SLSTMMemory | None = None, starts: Tensor | None = None
) -> tuple[Tensor, SLSTMMemory]:
    """Run the cells one token at a time: outputs enter the gates, so no other order exists.

        z, i, f, o = x[t] + R y[t-1]
        m[t] = max(log sigmoid(f) + m[t-1], i)
        c[t] = exp(log sigmoid(f) + m[t-1] - m[t]) c[t-1] + exp(i - m[t]) tanh(z)
        n[t] = exp(log sigmoid(f) + m[t-1] - m[t]) n[t-1] + exp(i - m[t])
        y[t] = sigmoid(o) c[t] / n[t]

    Before the first token of a document m counts as -inf, so that m[0] = i.

    Args:
        x: (b, t, 4, h, n), t >= 1.
        R: (4, h, n, n).
        memory: carried in; zeros if None.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        (b, t, h, n) every y, and the memory after the last token, in at least float32.
    """
    x, R = full_precision(x), full_precision(R)
    if memory is None:
        zeros = torch.zeros_like(x[:, 0, 0])
        memory = SLSTMMemory(zeros, zeros, zeros, zeros)
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            new = starts[:, t, None, None]
            memory = SLSTMMemory(*(leaf.masked_fill(new, 0.0) for leaf in memory))
        memory = slstm_step(memory, x[:, t], R)
        ys.append(memory.y)
    return torch.stack(ys, 1), memory


def slstm_step(memory: SLSTMMemory, x: Tensor, R: Tensor) -> SLSTMMemory:
    """One token of `slstm_ref`: x (b, 4, h, n)."""
    x, R = full_precision(x), full_precision(R)
    y, c, n, m = memory
    z, i, f, o = (x + (y[:, None].unsqueeze(-2) @ R).squeeze(-2)).unbind(1)
    faded = F.logsigmoid(f) + m
    m = torch.where(n == 0, i, torch.maximum(faded, i))  # n is 0 only before the first token
    keep, write = (faded - m).clamp(max=0.0).exp(), (i - m).exp()
    keep = torch.where(n == 0, 0.0, keep)
    c = torch.addcmul(keep * c, write, z.tanh())
    n = torch.addcmul(write, keep, n)
    return SLSTMMemory(o.sigmoid() * c / n, c, n, m)


def slstm_flops(batch: int, seq_len: int, heads: int, n: int) -> int:
    """Work of the matrix products of `slstm_ref`; a multiply-add counts 2."""
    return 2 * batch * seq_len * 4 * heads * n * n


SLSTM_SCAN = Engines(
    "slstm",
    reference=slstm_ref,
    torch=slstm_ref,
    native="kizzasi.models.ops.native.slstm:slstm",
)
