"""The selective scan on a CPU, block by block, with its adjoint written out.

Symbols as in ops/selective_scan.py. What it costs per state (one of b t d n), on one AVX-512 core:
the fast path is 5 torch calls over a block forward and 15 backward. A call over a block that sits
in the L2 cache takes 0.06 (products) to 0.2 ns (exp, multiply-add): 0.7 ns forward and 2.0 ns
backward is the floor of plain torch. Measured: 1.5 and 4.3 ns, the rest being cache misses, page
faults and 1.3 us per call; two cores give 1.2 and 3.0, as the recurrence itself is too short a call
to be shared. Other layouts were slower: n innermost takes 1.06 instead of 0.82 ns for a block
forward and twice the time for sums over n; scanning chunks in parallel and then adding what they
carry takes 2.7 instead of 0.85 ns for the recurrence, because it passes over all states again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

ROW_STATES = 2**15  # b d n of one token on a CPU; a larger batch is cut into pieces
BLOCK_STATES = 2**18  # states of a block per thread: 1 MiB of float32
MIN_STEPS, MAX_STEPS = 8, 64  # tokens per block; one state per block is kept for backward


def cut_sizes(u: Tensor, n: int) -> tuple[int, int]:
    """In how many pieces the batch is worked through, and how many tokens a block has."""
    b, t, d = u.shape
    pieces = min(b, -(-b * d * n // ROW_STATES))
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    fit = threads * BLOCK_STATES // (-(-b // pieces) * d * n)
    return pieces, min(t, MAX_STEPS, max(MIN_STEPS, fit))


def _cut(v: Tensor, steps: int) -> list[Tensor]:
    """(b, t, k) -> blocks of (steps b, 1, k), contiguous, token by token."""
    return [k.flatten(0, 1).unsqueeze(1) for k in v.transpose(0, 1).contiguous().split(steps)]


class _Block:
    """Buffers for the tokens of one block, used again by every block.

    Decays a, states h and their gradients g are (steps b, n, d), and by token in a_rows, h_rows
    and g_rows. dt, x = dt u and dy are (steps b, 1, d), and (steps, b, d) in dt_in, x_in and dy_in.
    """

    def __init__(self, like: Tensor, steps: int, n: int, *, gradients: bool = False) -> None:
        b, _, d = like.shape
        self.dt, self.x, self.dy = like.new_empty(3, steps * b, 1, d)
        self.dt_in, self.x_in, self.dy_in = (
            v.view(steps, b, d) for v in (self.dt, self.x, self.dy)
        )
        self.a, self.h = like.new_empty(2, steps * b, n, d)
        self.g = torch.empty_like(self.h) if gradients else self.h[:0]
        self.a_rows, self.h_rows, self.g_rows = (v.split(b) for v in (self.a, self.h, self.g))

    def run(
        self, dt: Tensor, u: Tensor, At: Tensor, B: Tensor, starts: Tensor | None, h: Tensor
    ) -> Tensor:
        """Fill dt, x, a and h from the inputs of a block and the state h before it."""
        self.dt_in.copy_(dt)
        torch.mul(dt, u, out=self.x_in)
        torch.mul(self.dt, At, out=self.a).exp_()
        if starts is not None:
            self.a.masked_fill_(starts, 0.0)
        torch.mul(self.x, B.mT, out=self.h)
        for a_row, h_row in zip(self.a_rows, self.h_rows, strict=True):
            h = h_row.addcmul_(a_row, h)
        return h


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    keep: bool,
    pieces: int,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last h and, where `keep`, the states before every block (blocks, b, n, d).

    Every product writes into a buffer, which also keeps autocast from lowering its precision.
    """
    n, At, h0 = A.shape[1], A.t().contiguous(), h0.transpose(1, 2)
    y, last, before = results(u, h0.mT, keep, steps)
    for u_i, dt_i, B_i, C_i, h, starts_i, y_i, last_i, before_i in _pieces(
        pieces, u, dt, B, C, h0, starts, y, last, before.transpose(0, 1)
    ):
        blocks = {w: _Block(u_i, w, n) for w in {steps, u.shape[1] % steps} - {0}}
        work = zip(
            *(v.transpose(0, 1).split(steps) for v in (dt_i, u_i, y_i)),
            *(_cut(v, steps) for v in (B_i, C_i)),
            repeat(None) if starts_i is None else _cut(starts_i.unsqueeze(-1), steps),
            strict=False,
        )
        for k, (dt_k, u_k, y_k, B_k, C_k, starts_k) in enumerate(work):
            block = blocks[len(dt_k)]
            h_k = before_i[:, k if keep else 0].copy_(h)
            h = block.run(dt_k, u_k, At, B_k, starts_k, h_k)
            torch.bmm(C_k, block.h, out=block.x)
            torch.addcmul(block.x_in, u_k, D, out=y_k)
        last_i.copy_(h.mT)
    return y, last, before


def backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    before: Tensor,
    dy: Tensor,
    dh: Tensor,
    pieces: int,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D and h0 from those of y and the last h."""
    t, n, At = u.shape[1], A.shape[1], A.t().contiguous()
    du, ddt, dA, dB, dC, dD, dh0 = rooms(u, dt, A, B, C, D, dh)
    for total in (dA, dD):
        total.zero_()
    dAt = dA.t()
    for (
        u_i,
        dt_i,
        B_i,
        C_i,
        starts_i,
        before_i,
        dy_i,
        dh_i,
        du_i,
        ddt_i,
        dB_i,
        dC_i,
        dh0_i,
    ) in _pieces(pieces, u, dt, B, C, starts, before.transpose(0, 1), dy, dh, du, ddt, dB, dC, dh0):
        b = len(u_i)
        blocks = {w: _Block(u_i, w, n, gradients=True) for w in {steps, t % steps} - {0}}
        carry = dh_i.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        dB_rows, dC_rows = u.new_empty(2, t * b, 1, n)
        work = zip(
            *(v.transpose(0, 1).split(steps) for v in (dt_i, u_i, dy_i, ddt_i, du_i)),
            *(_cut(v, steps) for v in (B_i, C_i)),
            *(v.split(steps * b) for v in (dB_rows, dC_rows)),
            before_i.unbind(1),
            [None] * before_i.shape[1] if starts_i is None else _cut(starts_i.unsqueeze(-1), steps),
            strict=True,
        )
        for dt_k, u_k, dy_k, ddt_k, du_k, B_k, C_k, dB_k, dC_k, h_k, starts_k in reversed([*work]):
            block = blocks[len(dt_k)]
            block.run(dt_k, u_k, At, B_k, starts_k, h_k)
            block.dy_in.copy_(dy_k)
            a, h, g = block.a, block.h, block.g
            torch.mul(block.dy, C_k.mT, out=g)
            g_row = block.g_rows[-1].add_(carry)
            for a_row, row in zip(block.a_rows[:0:-1], block.g_rows[-2::-1], strict=True):
                g_row = row.addcmul_(a_row, g_row)
            torch.mul(block.a_rows[0], g_row, out=carry)
            torch.bmm(block.dy, h.mT, out=dC_k)
            torch.bmm(block.x, g.mT, out=dB_k)
            torch.bmm(B_k, g, out=block.x)  # now the gradient of x = dt u
            torch.mul(block.x_in, dt_k, out=du_k).addcmul_(block.dy_in, D)
            g.mul_(a)  # times h[t-1] below: the gradient of the exponent dt A
            g[b:].mul_(h[:-b])
            g[:b].mul_(h_k)
            dAt += torch.mul(g, block.dt, out=a).sum(0)
            torch.sum(g.mul_(At), 1, keepdim=True, out=block.dt)
            torch.addcmul(block.dt_in, block.x_in, u_k, out=ddt_k)
            dD += block.dy_in.mul_(u_k).sum((0, 1))
        for dV_i, rows in ((dB_i, dB_rows), (dC_i, dC_rows)):
            dV_i.copy_(rows.view(t, b, n).transpose(0, 1))
        dh0_i.copy_(carry.mT)
    return du, ddt, dA, dB, dC, dD, dh0


def results(u: Tensor, h0: Tensor, keep: bool, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `forward` returns."""
    b, d, n = h0.shape
    blocks = -(-u.shape[1] // steps) if keep else 1
    return u.new_empty(u.shape), u.new_empty(b, d, n), u.new_empty(blocks, b, n, d)


def rooms(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Room for what `backward` returns."""
    return tuple(v.new_empty(v.shape) for v in inputs)


def _pieces(n: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of n pieces of the batch."""
    pieces = (repeat(None, n) if v is None else v.chunk(n) for v in tensors)
    return zip(*pieces, strict=False)
