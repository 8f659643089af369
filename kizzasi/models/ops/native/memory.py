"""Matrix memories in C, on a CPU: linear attention with decay, state space duality, delta rules and
RWKV-7 are one recurrence. memory.c says how.

Symbols: b batch, t time, h heads, n channels of a key, m channels of a value, S (b, h, ..) memory.

    S[t] = S[t-1] diag(exp(w[t])) + (S[t-1] a[t]) b[t]^T + v[t] k[t]^T,      indexed [value, key]
    y[t] = S[t] q[t],      or if early: S[t-1] q[t]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops import autodiff, delta, linear_attention, ssd, wkv7
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.native import library
from kizzasi.models.ops.precision import in_full_precision


class _How(NamedTuple):
    """What is not a tensor: whether memory is indexed [key, value]; whether it is read before it is
    written; and the torch form, of the same tensors, for what the kernels cannot do."""

    key_first: bool
    early: bool
    plain: Callable[..., tuple[Tensor, Tensor]]


def _run(how: _How, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """given: q, k (b, t, g, n) with g a divisor of h, v (b, t, h, m), w (b or 1, t or 1, h or 1, n
    or 1), a, b (b, t, h, n) or None, the memory before (b, h, ..), starts (b, t) or None."""
    *tensors, _ = given
    if library.differentiable(*tensors):
        return _Memory.apply(how, *given)
    y, last, _ = _forward(how, given, False)
    return y, last


def _sizes(how: _How, given: tuple[Tensor | None, ...]) -> list[int]:
    q, k, v, w, a, b, *_ = given
    assert q is not None
    assert v is not None
    assert w is not None
    (batch, t, h, m), n = v.shape, q.shape[-1]
    strides = []
    for x in (q, k, v, w, a, b):
        strides += [0 if x is None or x.shape[i] == 1 else x.stride(i) for i in range(3)]
    inner = [1, m] if how.key_first else [n, 1]
    one, fixed = w.shape[-1] == 1, _fixed(w, t)
    threads = library.threads(batch * t * h * n * m)
    flags = [h // q.shape[2], int(one), int(fixed), int(how.early), threads]
    return [batch, t, h, n, m, *strides, *inner, *flags]


def _fixed(w: Tensor, t: int) -> bool:
    """Whether all tokens have one decay."""
    return w.shape[1] == 1 and t > 1


def _forward(
    how: _How, given: tuple[Tensor | None, ...], keep: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    *streams, s0, starts = given
    rows = [None if x is None else library.rows(x) for x in streams]
    ends = [None if x is None else x.contiguous() for x in (s0, starts)]
    ready = (*rows, *ends)
    v, s0 = rows[2], ends[0]
    assert v is not None
    assert s0 is not None
    sizes, before = _sizes(how, ready), None
    if keep:
        steps, numbers = library.ask("memory_sizes", v.dtype, 2, *sizes)
        b, t, h, _ = v.shape
        before = v.new_empty(-(-t // steps), b * h, numbers)
    y, last = v.new_empty(v.shape), torch.empty_like(s0)
    library.call("memory_forward", v.dtype, [*ready, before, y, last], *sizes)
    return y, last, [*ready, before]


class _Memory(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, how: _How, *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last, kept = _forward(how, given, True)
        ctx.how, ctx.isa = how, library.instruction_set()
        ctx.save_for_backward(*kept)
        return y, last

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        *given, before = ctx.saved_tensors
        if autodiff.too_narrow(dy, dlast):
            return None, *autodiff.gradients(ctx.how.plain, given, (dy, dlast))
        q, _, v, w, a, _, s0, _ = given
        batch, t, h, _ = v.shape
        keys = (batch, t, h, q.shape[-1])
        dq, dk = v.new_empty(keys), v.new_empty(keys)
        da, db = (None, None) if a is None else (v.new_empty(keys), v.new_empty(keys))
        fixed, dw = _fixed(w, t), None
        if ctx.needs_input_grad[4]:
            dw = v.new_empty((batch, *([1] if fixed else [t]), h, w.shape[-1]))
        dv, ds0 = v.new_empty(v.shape), torch.empty_like(s0)
        results = [dy.contiguous(), dlast.contiguous(), dq, dk, dv, dw, da, db, ds0]
        with library.using(ctx.isa):  # the memories are laid out for it
            sizes = _sizes(ctx.how, tuple(given))
            library.call("memory_backward", v.dtype, [*given, before, *results], *sizes)
        dq, dk = (x if x.shape == q.shape else _of_groups(x, q.shape[2]) for x in (dq, dk))
        dw = None if dw is None else dw.sum_to_size(w.shape)
        return None, dq, dk, dv, dw, da, db, ds0, None


def _of_groups(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(2, (groups, -1)).sum(3)


def _plain_linear(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, s, starts = rest
    return linear_attention._joined(q, k, v, w, None, s, starts)


def _plain_early(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, s, starts = rest
    return linear_attention._joined(q, k, v, w, q.new_zeros(q.shape[2:]), s, starts)


LINEAR, EARLY = _How(True, False, _plain_linear), _How(True, True, _plain_early)


@in_full_precision
def linear_attention_native(
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
        y, s = _run(LINEAR if u is None else EARLY, q, k, v, decay, None, None, rest[-1], starts)
        if u is not None:
            y = torch.addcmul(y, (q * u * k).sum(-1, keepdim=True), v)
        return y, s

    return isolated(run, starts, (q, k, v), () if fixed else (w,), (s,))


def _plain_ssd(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, s, starts = rest
    return ssd._by_chunks(v, w.squeeze(-1), k, q, s, starts)


DUAL = _How(False, False, _plain_ssd)


def _by_steps(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd._by_chunks`, compiled."""
    return _run(DUAL, C, B, x, log_decay.unsqueeze(-1), None, None, h, starts)


@in_full_precision
def ssd_native(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_ref`: the same arguments, results and errors."""
    return ssd.run_ssd(_by_steps, x, log_decay, B, C, state, starts)


@in_full_precision
def trapezoid_native(
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
    return ssd.run_trapezoid(_by_steps, x, dt, log_decay, share, B, C, state, starts)


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


WKV7, DELTA = _How(False, False, _plain_lookup), _How(True, False, _plain_delta)


@in_full_precision
def wkv7_native(
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
    wkv7._same_shape(r, w, k, v, a, b)

    def run(
        r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _run(WKV7, r, k, v, w, a, b, s, starts)

    return isolated(run, starts, (r, k, v, a, b), (w,), (wkv7._empty(r) if s0 is None else s0,))


@in_full_precision
def delta_rule_native(
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
        return _run(DELTA, q, k, share * v, g, k * g.exp(), -share * k, s, starts)

    return isolated(run, starts, (q, k, v, beta), (g,), (s,))
