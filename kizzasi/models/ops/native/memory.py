"""Matrix memories in C, on a CPU: the one recurrence of matrix_memory.py. memory.c says how.

Symbols: b batch, t time, h heads, n channels of a key, m channels of a value, S (b, h, ..) memory.

    S[t] = S[t-1] diag(exp(w[t])) + (S[t-1] a[t]) b[t]^T + v[t] k[t]^T,      indexed [value, key]
    y[t] = S[t] q[t],      or if early: S[t-1] q[t]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops.matrix_memory import How, MatrixMemory, is_fixed
from kizzasi.models.ops.native import library


def _run(how: How, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """given: q, k (b, t, g, n) with g a divisor of h, v (b, t, h, m), w (b or 1, t or 1, h or 1, n
    or 1), a, b (b, t, h, n) or None, the memory before (b, h, ..), starts (b, t) or None."""
    *streams, s0, starts = given
    rows = [None if x is None else library.rows(x) for x in streams]
    ready = (*rows, *(None if x is None else x.contiguous() for x in (s0, starts)))
    if library.differentiable(*ready[:-1]):
        return _Memory.apply(how, *ready)
    y, last, _ = _forward(how, ready, False)
    return y, last


def _sizes(how: How, given: tuple[Tensor | None, ...]) -> list[int]:
    q, k, v, w, a, b, *_ = given
    assert q is not None
    assert v is not None
    assert w is not None
    (batch, t, h, m), n = v.shape, q.shape[-1]
    strides = []
    for x in (q, k, v, w, a, b):
        strides += [0 if x is None or x.shape[i] == 1 else x.stride(i) for i in range(3)]
    inner = [1, m] if how.key_first else [n, 1]
    one, fixed = w.shape[-1] == 1, is_fixed(w, t)
    threads = library.threads(batch * t * h * n * m)
    flags = [h // q.shape[2], int(one), int(fixed), int(how.early), threads]
    return [batch, t, h, n, m, *strides, *inner, *flags]


def _forward(
    how: How, given: tuple[Tensor | None, ...], keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last memory, and where `keep` the memories before blocks."""
    v, s0 = given[2], given[6]
    assert v is not None
    assert s0 is not None
    sizes, before = _sizes(how, given), None
    if keep:
        steps, numbers = library.ask("memory_sizes", v.dtype, 2, *sizes)
        b, t, h, _ = v.shape
        before = v.new_empty(-(-t // steps), b * h, numbers)
    y, last = v.new_empty(v.shape), torch.empty_like(s0)
    library.call("memory_forward", v.dtype, [*given, before, y, last], *sizes)
    return y, last, before


class _Memory(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, how: How, *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last, before = _forward(how, given, True)
        ctx.how, ctx.isa = how, library.instruction_set()
        ctx.save_for_backward(*given, before)
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
        fixed, dw = is_fixed(w, t), None
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


_KERNELS = MatrixMemory(_run)
linear_attention = _KERNELS.linear_attention
ssd, trapezoid = _KERNELS.ssd, _KERNELS.trapezoid
mimo_trapezoid = _KERNELS.mimo_trapezoid
wkv7 = _KERNELS.wkv7
delta_rule, delta_rule_2 = _KERNELS.delta_rule, _KERNELS.delta_rule_2
