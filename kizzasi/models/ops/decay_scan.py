"""A leaky memory per channel whose decay is data: the recurrence of the RG-LRU.

Symbols: b batch, t time, i channels, c tokens in a block, z blocks.

log_a   logarithm of what a channel keeps of itself in a token, <= 0
u       what it takes in
h       memory

Source: De et al. 2024, arXiv:2402.19427, section 2.4; Martin & Cundy 2018, arXiv:1709.04057,
section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import full_precision

BLOCK = 16  # log2 of it passes over all tokens, then the same over one token in BLOCK


def decay_scan_ref(
    log_a: Tensor, u: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the memories one token at a time.

        h[t] = exp(log_a[t]) h[t-1] + u[t],      h[-1] = h0 (zeros if None)

    This loop is the definition; `decay_scan` must agree with it. O(t) steps.

    Args:
        log_a: (b, t, i) log of the decay, <= 0; -inf forgets everything.
        u: (b, t, i) what is written, t >= 1.
        h0: (b, i) memory carried in; zeros if None.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        (b, t, i) the memory after every token, and (b, i) the last one, in at least float32.
    """
    log_a, u = full_precision(log_a), full_precision(u)
    a = log_a.exp()
    h = torch.zeros_like(u[:, 0]) if h0 is None else h0.to(u.dtype)
    states = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None], 0.0)
        h = decay_scan_step(h, a[:, t], u[:, t])
        states.append(h)
    return torch.stack(states, 1), h


def decay_scan_step(h: Tensor, a: Tensor, u: Tensor) -> Tensor:
    """One token of `decay_scan_ref`: all (b, i), a the decay itself, not its logarithm."""
    return torch.addcmul(u, a, h)


def decay_scan(
    log_a: Tensor, u: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decay_scan_ref` in O(log t) passes over all tokens.

    Within a block every pass doubles the reach of each memory; the ends of the blocks are scanned
    likewise. Only products of decays occur, and no quotients.

    Differs: with `starts`, a memory that became infinite out of finite numbers is not forgotten
    (0 times infinity is NaN); NaN and infinities that come in stay in their document.
    """
    log_a, u = full_precision(log_a), full_precision(u)
    h0 = torch.zeros_like(u[:, 0]) if h0 is None else h0.to(u.dtype)

    def run(u: Tensor, log_a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        a = log_a.exp()
        if starts is not None:
            a = a.masked_fill(starts[..., None], 0.0)
        h = _scan(a, u, h0)
        return h, h[:, -1]

    return isolated(run, starts, (u,), (log_a,), (h0,))


def _scan(a: Tensor, u: Tensor, h0: Tensor) -> Tensor:
    """h (b, t, i) with h[t] = a[t] h[t-1] + u[t]."""
    t = u.shape[1]
    c = min(t, BLOCK)
    rest = -t % c
    a = F.pad(a, (0, 0, 0, rest)).unflatten(1, (-1, c))  # (b, z, c, i)
    h = F.pad(u, (0, 0, 0, rest)).unflatten(1, (-1, c))
    reach = 1
    while reach < c:  # a: product of the decays of the last `reach` tokens, h: what they wrote
        earlier = a[:, :, reach:] * h[:, :, :-reach]
        h = torch.cat([h[:, :, :reach], h[:, :, reach:] + earlier], 2)
        a = torch.cat([a[:, :, :reach], a[:, :, reach:] * a[:, :, :-reach]], 2)
        reach *= 2
    before = h0[:, None]
    if h.shape[1] > 1:
        ends = _scan(a[:, :-1, -1], h[:, :-1, -1], h0)
        before = torch.cat([before, ends], 1)
    return torch.addcmul(h, a, before[:, :, None]).flatten(1, 2)[:, :t]


DECAY_SCAN = Engines(
    "decay_scan",
    reference=decay_scan_ref,
    torch=decay_scan,
    native="kizzasi.models.ops.native.decay_scan:decay_scan",
    triton="kizzasi.models.ops.triton.decay_scan:decay_scan",
)
