"""The trapezoidal rule of `ops/ssd.py` with several inputs and outputs a head (Mamba-3, MIMO).

b batch · t time · h heads · p, n as in `ops/ssd.py` · r rank: how many values a token writes, each
under a key of its own, and how many keys it reads by

| here | paper | meaning |
|---|---|---|
| x (b,t,h,r,p) | X | what is written |
| B, C (b,t,h,r,n) | B, C | under which keys, and with which keys memory is read |
| state (b,h,p,n) | H | the memory, as large as with one input and output |

Source: Mamba-3, arXiv:2603.15569, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.ssd import Core, TrapezoidState, _by_chunks, ssd_flops


@in_full_precision
def mimo_trapezoid_ref(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None = None,
) -> tuple[Tensor, TrapezoidState]:
    """`trapezoid_ref` of r values a token and head, one token at a time.

        W[t] = sum_r x[t, r] B[t, r]^T
        H[t] = a H[t-1] + (1 - share) dt a W[t-1] + share dt W[t]
        y[t, r] = H[t] C[t, r]                         with a = exp(log_decay), all at t

    This loop is the definition; `mimo_trapezoid` must agree with it.

    Args:
        x: (b, t, h, r, p) values, t >= 1.
        dt, log_decay, share: (b, t, h), as there.
        B, C: (b, t, h, r, n).
        state: of earlier tokens: h (b, h, p, n), B (b, h, r, n), x (b, h, r, p).
        starts: (b, t) bool, True where a document starts: what came before it counts as zero.

    Returns:
        y (b, t, h, r, p), and the state after the last token.
    """
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            first = starts[:, t, None, None, None]
            state = TrapezoidState(*(v.masked_fill(first, 0.0) for v in state))
        y, state = mimo_trapezoid_step(
            state, x[:, t], dt[:, t], log_decay[:, t], share[:, t], B[:, t], C[:, t]
        )
        ys.append(y)
    return torch.stack(ys, 1), state


@in_full_precision
def mimo_trapezoid_step(
    state: TrapezoidState,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
) -> tuple[Tensor, TrapezoidState]:
    """One token of `mimo_trapezoid_ref`: inputs without t -> y (b, h, r, p), the new state."""
    left, right = ((part * dt)[..., None, None] for part in (1.0 - share, share))
    h = (state.h + left * (state.x.mT @ state.B)) * log_decay.exp()[..., None, None]
    h = h + right * (x.mT @ B)
    return C @ h.mT, TrapezoidState(h, B, x)


@in_full_precision
def mimo_trapezoid(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None = None,
) -> tuple[Tensor, TrapezoidState]:
    """`mimo_trapezoid_ref` by `ssd` over r tokens for each: the same arguments and results.

    The first of them fades, each writes and reads in turn. As in `trapezoid`, a token writes at
    once what it adds at the next step. So what it reads of itself is amiss, and set right by r x r
    products: too much of its own inputs up to the one that reads, and none of the later ones.
    """
    return run_mimo(_by_chunks, x, dt, log_decay, share, B, C, state, starts)


def run_mimo(
    core: Core,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None,
) -> tuple[Tensor, TrapezoidState]:
    """`mimo_trapezoid` by any core of `ssd`."""

    def run(
        x: Tensor,
        dt: Tensor,
        share: Tensor,
        B: Tensor,
        C: Tensor,
        log_decay: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, TrapezoidState]:
        return _by_ssd(core, x, dt, log_decay, share, B, C, TrapezoidState(*state), starts)

    return isolated(run, starts, (x, dt, share, B, C), (log_decay,), state)


def _by_ssd(
    core: Core,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None,
) -> tuple[Tensor, TrapezoidState]:
    r, left, right = x.shape[3], ((1.0 - share) * dt)[..., None, None], share * dt
    h = state.h + left[:, 0] * (state.x.mT @ state.B)
    after = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], 1)
    right = right[..., None, None]
    later = torch.zeros(r - 1, dtype=torch.bool, device=x.device)
    if starts is not None:
        first = torch.ones(1, dtype=torch.bool, device=x.device)
        starts = (starts.unsqueeze(-1) & torch.cat([first, later])).flatten(1)
    fade = torch.cat(
        [
            log_decay.unsqueeze(2),
            log_decay.new_zeros(r - 1).expand(*log_decay.shape, r - 1).movedim(-1, 2),
        ],
        2,
    ).flatten(1, 2)
    one_by_one = (v.transpose(2, 3).flatten(1, 2) for v in ((right + after) * x, B, C))
    written, keys, reads = one_by_one
    y, h = core(written, fade, keys, reads, h, starts)
    y = y.unflatten(1, (-1, r)).transpose(2, 3)
    seen = torch.ones(r, r, dtype=torch.bool, device=x.device).tril()
    y = y + ((C @ B.mT) * torch.where(seen, -after, right)) @ x
    return y, TrapezoidState(h, B[:, -1].clone(), x[:, -1].clone())


def mimo_flops(batch: int, seq_len: int, heads: int, rank: int, p: int, n: int) -> int:
    """Work of the matrix products of `mimo_trapezoid`; a multiply-add counts 2."""
    own = 2 * batch * heads * (seq_len * rank**2 * (n + p) + rank * p * n)
    return ssd_flops(batch, seq_len * rank, heads, heads, p, n) + own


MIMO_TRAPEZOID = Engines(
    "mimo_trapezoid",
    reference=mimo_trapezoid_ref,
    torch=mimo_trapezoid,
    native="kizzasi.models.ops.native.memory:mimo_trapezoid",
    triton="kizzasi.models.ops.triton.memory:mimo_trapezoid",
)
