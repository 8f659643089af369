"""One diagonal, time-invariant state space that all channels share: the scan of S5.

    h[t] = a h[t-1] + v[t]        (section 2.2: a = Lambda bar, v = B bar u)

    a   (n,) what a state keeps of itself in one token, complex, |a| <= 1
    v   (b, t, n) what it takes in;  h (b, t, n) states
    c   tokens in a block

Source: Smith, Warrington & Linderman 2023, arXiv:2208.04933.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.s4 import discretize, powers, real_rows

BLOCK = 16  # log2 of it passes over all states, then the same over one state in BLOCK


def diagonal_scan_ref(
    v: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """Run the states one token at a time.

    This loop is the definition; `diagonal_scan` must agree with it.

    Args:
        v: (b, t, n) inputs, t >= 1, in a's dtype.
        a: (n,) decays.
        h0: (b, n) state carried in; None means zeros.
        starts: (b, t) bool, True where the state is zeroed before the token; None means nowhere.

    Returns:
        (b, t, n) the state after every token.
    """
    h = torch.zeros_like(v[:, 0]) if h0 is None else h0
    states = []
    for i in range(v.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, i, None], 0, h)
        h = a * h + v[:, i]
        states.append(h)
    return torch.stack(states, dim=1)


def diagonal_scan(
    v: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """`diagonal_scan_ref` in O(log t) passes.

    Within a block every pass doubles the reach of each state; the ends of the blocks are scanned
    likewise, with a^c, and what they carry is added. Only powers of a occur, and no quotients.

    Differs: the authors scan all tokens with one associative operator on pairs (a, h); a is the
        same at every token, so that half of each pair is known beforehand.
    """
    t = v.shape[1]
    c = min(t, BLOCK)
    rest = -t % c
    h = F.pad(v, (0, 0, 0, rest)).unflatten(1, (-1, c))
    document = None  # (b, j, c): documents begun so far
    if starts is not None:
        document = F.pad(starts, (0, rest)).cumsum(1).unflatten(1, (-1, c))
    reach, decay = 1, a
    while reach < c:
        earlier = decay * h[:, :, :-reach]
        if document is not None:
            same = document[:, :, reach:] == document[:, :, :-reach]
            earlier = torch.where(same[..., None], earlier, 0)
        h = h + F.pad(earlier, (0, 0, reach, 0))
        reach, decay = 2 * reach, decay * decay
    kept = None  # where a block still continues what came before it
    if document is not None:
        begun = F.pad(document[:, :-1, -1], (1, 0))
        kept = document == begun[:, :, None]
    table, _ = powers(a[None], c + 1)
    before = torch.zeros_like(v[:, :1]) if h0 is None else h0[:, None]
    if h.shape[1] > 1:
        resets = None if kept is None else ~kept[:, :, -1]
        ends = diagonal_scan(h[:, :, -1], table[0, c], h0, resets)
        before = torch.cat([before, ends[:, :-1]], 1)
    carried = table[:, 1:] * before[:, :, None]
    if kept is not None:
        carried = torch.where(kept[..., None], carried, 0)
    return (h + carried).flatten(1, 2)[:, :t]


@in_full_precision
def s5_enter(
    x: Tensor, log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """v (..., n) and a (n,) of inputs x (..., d), of a layer's parameters.

    Args:
        log_dt, log_A_real, A_imag: (n,) log of the steps, log of -Re Lambda, and Im Lambda.
        B: (n, d, 2) real and imaginary parts.
    """
    A = torch.complex(-log_A_real.exp(), A_imag)
    a, hold = discretize(A, log_dt.exp(), "zoh")
    v = F.linear(x, B.transpose(1, 2).flatten(0, 1))
    return hold * torch.view_as_complex(v.unflatten(-1, (-1, 2))), a


@in_full_precision
def s5_leave(x: Tensor, h: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y (..., d) = 2 Re(C h) + D x of states h (..., n); C (d, n, 2) in real and imaginary parts,
    D (d,). A state stands for a conjugate pair."""
    pairs = 2 * torch.view_as_complex(C)
    return F.linear(real_rows(h), real_rows(pairs.conj())) + D * x


DIAGONAL_SCAN = Engines("diagonal_scan", reference=diagonal_scan_ref, torch=diagonal_scan)
