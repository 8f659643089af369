"""Matrix memories in Triton, on CUDA: the one recurrence of matrix_memory.py; symbols as there.

A program is one batch row, one head and BM channels of the value; S (N, BM) stays in registers,
indexed [key, value]. What keys and queries get from all values is written down by blocks of values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops.matrix_memory import How, MatrixMemory, is_fixed
from kizzasi.models.ops.triton import launch
from kizzasi.models.ops.triton.launch import STEPS

VALUES = 32  # channels of a program
MOST = 2**12  # numbers of S in a program


@triton.jit
def memory_forward(
    q_,
    k_,
    v_,
    w_,
    a_,
    b_,
    s0_,
    starts_,
    before_,
    y_,
    last_,
    t,
    h,
    n,
    m,
    shared,
    s_n,
    s_m,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    w_b,
    w_t,
    w_h,
    a_b,
    a_t,
    a_h,
    b_b,
    b_t,
    b_h,
    LOOKUP: tl.constexpr,
    EARLY: tl.constexpr,
    ONE: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
):
    """before (b h, blocks of STEPS tokens, n, m): the memory that each is entered with, where KEEP.
    ONE: a decay of all channels of a key."""
    item = tl.program_id(0).to(tl.int64)
    row, head = item // h, item % h
    i = tl.arange(0, N)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    in_n, in_m = i < n, j < m
    both = in_n[:, None] & in_m[None, :]
    inner = item * n * m + i[:, None] * s_n + j[None, :] * s_m
    S = tl.load(s0_ + inner, both, 0.0)
    q_ += row * q_b + head // shared * q_h + i
    k_ += row * k_b + head // shared * k_h + i
    v_ += row * v_b + head * v_h + j
    w_ += row * w_b + head * w_h
    a_ += row * a_b + head * a_h + i
    b_ += row * b_b + head * b_h + i
    y_ += (row * t * h + head) * m + j
    before_ += item * tl.cdiv(t, STEPS) * n * m + i[:, None] * m + j[None, :]
    for s in range(t):
        if KEEP and s % STEPS == 0:
            tl.store(before_ + s // STEPS * n * m, S, both)
        if PACKED:
            S = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, S)
        q = tl.load(q_ + s * q_t, in_n, 0.0)
        k = tl.load(k_ + s * k_t, in_n, 0.0)
        v = tl.load(v_ + s * v_t, in_m, 0.0)
        if EARLY:
            tl.store(y_ + s * h * m, tl.sum(S * q[:, None], 0), in_m)
        new = k[:, None] * v[None, :]
        if LOOKUP:
            a = tl.load(a_ + s * a_t, in_n, 0.0)
            b = tl.load(b_ + s * b_t, in_n, 0.0)
            new += b[:, None] * tl.sum(S * a[:, None], 0)[None, :]
        if ONE:
            S = S * tl.exp(tl.load(w_ + s * w_t)) + new
        else:
            S = S * tl.exp(tl.load(w_ + s * w_t + i, in_n, 0.0))[:, None] + new
        if not EARLY:
            tl.store(y_ + s * h * m, tl.sum(S * q[:, None], 0), in_m)
    tl.store(last_ + inner, S, both)


@triton.jit
def memory_backward(
    q_,
    k_,
    v_,
    w_,
    a_,
    b_,
    starts_,
    before_,
    dy_,
    dlast_,
    history_,
    dq_,
    dk_,
    dv_,
    dw_,
    da_,
    db_,
    ds0_,
    t,
    h,
    n,
    m,
    shared,
    s_n,
    s_m,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    w_b,
    w_t,
    w_h,
    a_b,
    a_t,
    a_h,
    b_b,
    b_t,
    b_h,
    LOOKUP: tl.constexpr,
    EARLY: tl.constexpr,
    ONE: tl.constexpr,
    FIXED: tl.constexpr,
    PACKED: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
):
    """Block after block of STEPS tokens from the end: ahead once more, the memory before each token
    into history (programs, STEPS, N, BM), and back. dq, dk, da, db (parts, b, t, h, n), dw the same
    or with a last 1 (ONE) or no t (FIXED), for the parts of the values."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = item // h, item % h
    i = tl.arange(0, N)
    j = part * BM + tl.arange(0, BM)
    in_n, in_m = i < n, j < m
    both = in_n[:, None] & in_m[None, :]
    inner = item * n * m + i[:, None] * s_n + j[None, :] * s_m
    dS = tl.load(dlast_ + inner, both, 0.0)
    fixed = tl.zeros_like(tl.sum(dS, 1))  # the gradient of a decay that all tokens share
    q_ += row * q_b + head // shared * q_h + i
    k_ += row * k_b + head // shared * k_h + i
    v_ += row * v_b + head * v_h + j
    w_ += row * w_b + head * w_h
    a_ += row * a_b + head * a_h + i
    b_ += row * b_b + head * b_h + i
    values = (row * t * h + head) * m + j
    parts = part * (tl.num_programs(0) // h) + row
    keys = (parts * t * h + head) * n + i
    blocks = tl.cdiv(t, STEPS)
    before_ += item * blocks * n * m + i[:, None] * m + j[None, :]
    history_ += (item * tl.num_programs(1) + part) * STEPS * N * BM
    history_ += i[:, None] * BM + tl.arange(0, BM)[None, :]
    for z in range(blocks):
        first = (blocks - 1 - z) * STEPS
        end = tl.minimum(first + STEPS, t)
        S = tl.load(before_ + (blocks - 1 - z) * n * m, both, 0.0)
        for s in range(first, end):
            tl.store(history_ + (s - first) * N * BM, S)
            if PACKED:
                S = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, S)
            k = tl.load(k_ + s * k_t, in_n, 0.0)
            v = tl.load(v_ + s * v_t, in_m, 0.0)
            new = k[:, None] * v[None, :]
            if LOOKUP:
                a = tl.load(a_ + s * a_t, in_n, 0.0)
                b = tl.load(b_ + s * b_t, in_n, 0.0)
                new += b[:, None] * tl.sum(S * a[:, None], 0)[None, :]
            if ONE:
                S = S * tl.exp(tl.load(w_ + s * w_t)) + new
            else:
                S = S * tl.exp(tl.load(w_ + s * w_t + i, in_n, 0.0))[:, None] + new
        tl.debug_barrier()
        for back in range(end - first):
            s = end - 1 - back
            left = tl.load(history_ + (s - first) * N * BM)
            old = left
            if PACKED:
                old = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, left)
            q = tl.load(q_ + s * q_t, in_n, 0.0)
            k = tl.load(k_ + s * k_t, in_n, 0.0)
            v = tl.load(v_ + s * v_t, in_m, 0.0)
            dy = tl.load(dy_ + values + s * h * m, in_m, 0.0)
            reads = q[:, None] * dy[None, :]
            if not EARLY:
                dS += reads
                tl.store(dq_ + keys + s * h * n, tl.sum(S * dy[None, :], 1), in_n)
            tl.store(dk_ + keys + s * h * n, tl.sum(dS * v[None, :], 1), in_n)
            tl.store(dv_ + values + s * h * m, tl.sum(dS * k[:, None], 0), in_m)
            if ONE:
                kept = dS * tl.exp(tl.load(w_ + s * w_t))
            else:
                kept = dS * tl.exp(tl.load(w_ + s * w_t + i, in_n, 0.0))[:, None]
            fading = tl.sum(kept * old, 1)
            if FIXED:
                fixed += fading
            elif ONE:
                tl.store(dw_ + (parts * t + s) * h + head, tl.sum(fading, 0))
            else:
                tl.store(dw_ + keys + s * h * n, fading, in_n)
            if LOOKUP:
                a = tl.load(a_ + s * a_t, in_n, 0.0)
                b = tl.load(b_ + s * b_t, in_n, 0.0)
                found = tl.sum(old * a[:, None], 0)
                dfound = tl.sum(dS * b[:, None], 0)
                tl.store(db_ + keys + s * h * n, tl.sum(dS * found[None, :], 1), in_n)
                tl.store(da_ + keys + s * h * n, tl.sum(old * dfound[None, :], 1), in_n)
                kept += a[:, None] * dfound[None, :]
            dS = kept
            if EARLY:
                dS += reads
                tl.store(dq_ + keys + s * h * n, tl.sum(old * dy[None, :], 1), in_n)
            if PACKED:
                dS = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, dS)
            S = left
        tl.debug_barrier()
    tl.store(ds0_ + inner, dS, both)
    if FIXED and ONE:
        tl.store(dw_ + parts * h + head, tl.sum(fixed, 0))
    elif FIXED:
        tl.store(dw_ + (parts * h + head) * n + i, fixed, in_n)


def _run(how: How, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    *streams, s0, starts = given
    rows = [None if x is None else launch.rows(x) for x in streams]
    ready = (*rows, *(None if x is None else x.contiguous() for x in (s0, starts)))
    if launch.differentiable(*ready[:-1]):
        return _Memory.apply(how, *ready)
    y, last, _ = _forward(how, ready, False)
    return y, last


def _ready(
    how: How, given: tuple[Any, ...]
) -> tuple[list[Tensor], tuple[int, int], list[int], dict[str, Any]]:
    """The inputs of both kernels but for memories, the grid, sizes and strides, and what a kernel
    is compiled for. What is absent is q, which is not read then."""
    q, k, v, w, a, b, _, starts = given
    (batch, t, h, m), n = v.shape, q.shape[-1]
    width = launch.padded(n)
    bm = launch.block(m, max(1, min(VALUES, MOST // width)))
    a, b = (q if x is None else x for x in (a, b))
    packed = q if starts is None else starts.view(torch.uint8)
    inner = [m, 1] if how.key_first else [1, n]
    sizes = [t, h, n, m, h // q.shape[2], *inner, *launch.strides(q, k, v, w, a, b)]
    flags = {"LOOKUP": given[4] is not None, "EARLY": how.early, "ONE": w.shape[-1] == 1}
    options = {**flags, "PACKED": starts is not None, "STEPS": STEPS, "N": width, "BM": bm}
    return [q, k, v, w, a, b, packed], (batch * h, launch.blocks(m, bm)), sizes, options


def _forward(
    how: How, given: tuple[Tensor | None, ...], keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last S, and where `keep` the memories before blocks."""
    s0 = given[6]
    assert s0 is not None
    (*tensors, packed), grid, sizes, options = _ready(how, given)
    v = tensors[2]
    (b, t, h, m), n = v.shape, tensors[0].shape[-1]
    y, last = v.new_empty(v.shape), torch.empty_like(s0)
    before = v.new_empty(b * h, launch.blocks(t, STEPS), n, m) if keep else None
    launch.run(
        memory_forward,
        grid,
        *tensors,
        s0,
        packed,
        y if before is None else before,
        y,
        last,
        *sizes,
        KEEP=keep,
        **options,
    )
    return y, last, before


class _Memory(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, how: How, *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last, before = _forward(how, given, True)
        ctx.how = how
        ctx.save_for_backward(*given, before)
        return y, last

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        *given, before = ctx.saved_tensors
        if autodiff.too_narrow(dy, dlast):
            return None, *autodiff.gradients(ctx.how.plain, given, (dy, dlast))
        tensors, grid, sizes, options = _ready(ctx.how, tuple(given))
        q, _, v, w, a, _, s0, _ = given
        (b, t, h, _), n, parts = v.shape, q.shape[-1], grid[1]
        keys, fixed = (parts, b, t, h, n), is_fixed(w, t)
        dq, dk = v.new_empty(2, *keys)
        da, db = (dq, dk) if a is None else v.new_empty(2, *keys)
        dw = v.new_empty(parts, b, *([1] if fixed else [t]), h, w.shape[-1])
        dv, ds0 = v.new_empty(v.shape), torch.empty_like(s0)
        history = v.new_empty(b * h * parts, STEPS, options["N"], options["BM"])
        launch.run(
            memory_backward,
            grid,
            *tensors,
            before,
            dy.contiguous(),
            dlast.contiguous(),
            history,
            dq,
            dk,
            dv,
            dw,
            da,
            db,
            ds0,
            *sizes,
            FIXED=fixed,
            **options,
        )
        dq, dk, dw, da, db = (x[0] if parts == 1 else x.sum(0) for x in (dq, dk, dw, da, db))
        if q.shape[2] != h:
            dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (dq, dk))
        da, db = (None, None) if a is None else (da, db)
        return None, dq, dk, dv, dw.sum_to_size(w.shape), da, db, ds0, None


_KERNELS = MatrixMemory(_run)
linear_attention = _KERNELS.linear_attention
ssd, trapezoid = _KERNELS.ssd, _KERNELS.trapezoid
mimo_trapezoid = _KERNELS.mimo_trapezoid
wkv7 = _KERNELS.wkv7
delta_rule, delta_rule_2 = _KERNELS.delta_rule, _KERNELS.delta_rule_2
