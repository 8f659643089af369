"""Matrix memories are one recurrence: linear attention with decay, state space duality, delta rules
and RWKV-7. Kernels that run it once serve them all.

Symbols: b batch, t time, h heads, n channels of a key, m channels of a value, S (b, h, ..) memory.

    S[t] = S[t-1] diag(exp(w[t])) + (S[t-1] a[t]) b[t]^T + v[t] k[t]^T,      indexed [value, key]
    y[t] = S[t] q[t],      or if early: S[t-1] q[t]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops import delta, linear_attention, mimo, ssd, wkv7
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.precision import in_full_precision


class How(NamedTuple):
    """What is not a tensor: whether memory is indexed [key, value]; whether it is read before it is
    written; and the torch form, of the same tensors, for what kernels cannot do."""

    key_first: bool
    early: bool
    plain: Callable[..., tuple[Tensor, Tensor]]


# How, then q, k (b, t, g, n) with g a divisor of h, v (b, t, h, m), w (b or 1, t or 1, h or 1, n or
# 1), a, b (b, t, h, n) or None, the memory before (b, h, ..), starts (b, t) or None; to y and the
# memory after.
Run = Callable[..., tuple[Tensor, Tensor]]


def is_fixed(w: Tensor, t: int) -> bool:
    """Whether all tokens have one decay."""
    return w.shape[1] == 1 and t > 1


def _plain_linear(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, s, starts = rest
    return linear_attention._joined(q, k, v, w, None, s, starts)


def _plain_early(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, s, starts = rest
    return linear_attention._joined(q, k, v, w, q.new_zeros(q.shape[2:]), s, starts)


LINEAR, EARLY = How(True, False, _plain_linear), How(True, True, _plain_early)


def _plain_ssd(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, s, starts = rest
    return ssd._by_chunks(v, w.squeeze(-1), k, q, s, starts)


DUAL = How(False, False, _plain_ssd)


def _square(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))


def _plain_lookup(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor, s: Tensor, starts: Any
) -> tuple[Tensor, Tensor]:
    """By RWKV-7's chunks, for which keys and values are made equally wide."""
    n, m = k.shape[-1], v.shape[-1]
    width = max(n, m)
    q, k, v, a, b, w = (_square(x, width) for x in (q, k, v, a, b, w.expand_as(k)))
    wide = F.pad(s, (0, width - n, 0, width - m))
    y, last = wkv7.wkv7_wide(q, w, k, v, a, b, wide, starts)
    return y[..., :m], last[..., :m, :n]


def _plain_delta(*given: Any) -> tuple[Tensor, Tensor]:
    q, k, v, w, a, b, s, starts = given
    y, last = _plain_lookup(q, k, v, w, a, b, s.mT, starts)
    return y, last.mT


WKV7, DELTA = How(False, False, _plain_lookup), How(True, False, _plain_delta)


@dataclass(frozen=True)
class MatrixMemory:
    """The ops over kernels that run the recurrence. Each has the arguments, results and errors of
    its loop."""

    run: Run

    @in_full_precision
    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        u: Tensor | None = None,
        s0: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`linear_attention_ref`: the same arguments, results and errors."""
        s = linear_attention._check(q, k, v, w, u, s0)
        fixed = w.shape[:2] != q.shape[:2]

        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            decay = w if fixed else rest[0]
            y, s = self.run(
                LINEAR if u is None else EARLY, q, k, v, decay, None, None, rest[-1], starts
            )
            if u is not None:
                y = torch.addcmul(y, (q * u * k).sum(-1, keepdim=True), v)
            return y, s

        return isolated(run, starts, (q, k, v), () if fixed else (w,), (s,))

    def _by_steps(
        self,
        x: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        h: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`ssd._by_chunks`, by the kernels."""
        return self.run(DUAL, C, B, x, log_decay.unsqueeze(-1), None, None, h, starts)

    @in_full_precision
    def ssd(
        self,
        x: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`ssd_ref`: the same arguments, results and errors."""
        return ssd.run_ssd(self._by_steps, x, log_decay, B, C, state, starts)

    @in_full_precision
    def trapezoid(
        self,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        share: Tensor,
        B: Tensor,
        C: Tensor,
        state: ssd.TrapezoidState,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, ssd.TrapezoidState]:
        """`trapezoid_ref`: the same arguments and results."""
        return ssd.run_trapezoid(self._by_steps, x, dt, log_decay, share, B, C, state, starts)

    @in_full_precision
    def mimo_trapezoid(
        self,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        share: Tensor,
        B: Tensor,
        C: Tensor,
        state: ssd.TrapezoidState,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, ssd.TrapezoidState]:
        """`mimo_trapezoid_ref`: the same arguments and results."""
        return mimo.run_mimo(self._by_steps, x, dt, log_decay, share, B, C, state, starts)

    @in_full_precision
    def wkv7(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        s0: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`wkv7_ref`: the same arguments, results and errors."""
        s0 = wkv7._check(r, w, k, v, a, b, s0)

        def run(
            r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor, s: Tensor
        ) -> tuple[Tensor, Tensor]:
            return self.run(WKV7, r, k, v, w, a, b, s, starts)

        return isolated(run, starts, (r, k, v, a, b), (w,), (s0,))

    @in_full_precision
    def delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        s0: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`delta_rule_ref`: the same arguments, results and errors.

        What a key finds in the faded memory is what it finds, itself faded, in the memory before.
        """
        s = delta._check(q, k, v, g, s0, beta=beta)

        def run(
            q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, s: Tensor
        ) -> tuple[Tensor, Tensor]:
            share = beta.unsqueeze(-1)
            return self.run(DELTA, q, k, share * v, g, k * g.exp(), -share * k, s, starts)

        return isolated(run, starts, (q, k, v, beta), (g,), (s,))

    @in_full_precision
    def delta_rule_2(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        erase: Tensor,
        write: Tensor,
        s0: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`delta_rule_2_ref`: the same arguments, results and errors."""
        s = delta._check(q, k, v, g, s0, erase=erase, write=write)

        def run(
            q: Tensor, k: Tensor, v: Tensor, erase: Tensor, write: Tensor, g: Tensor, s: Tensor
        ) -> tuple[Tensor, Tensor]:
            return self.run(DELTA, q, k, write * v, g, erase * k * g.exp(), -k, s, starts)

        return isolated(run, starts, (q, k, v, erase, write), (g,), (s,))
