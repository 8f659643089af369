"""`causal_conv1d` in Triton, on CUDA; symbols as there.

A program is one batch row, BT tokens and BC channels. x may be bfloat16 or float16: it is read as
it is, and sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import conv as torch_form
from kizzasi.models.ops.triton import launch
from kizzasi.models.ops.triton.first_use import proven

LONGEST = 32  # taps; longer filters are the torch form's
TOKENS, CHANNELS = 32, 64  # of a program


@triton.jit
def _inputs(
    x_, state_, doc_, row, s, i, own, j, t, c, x_b, x_t, K: tl.constexpr, PACKED: tl.constexpr
):
    """The input K - 1 - j tokens before each of s, from x or from the state (b, K - 1, c), where it
    is of the document `own`."""
    at = s + j - (K - 1)
    inside = i[None, :] < c
    now = (at >= 0) & (at < t) & (s < t)
    earlier = (at < 0) & (s < t)
    if PACKED:
        now = now & (tl.load(doc_ + row * t + at, now, -1) == own)
        earlier = earlier & (own == 0)
    x = tl.load(x_ + row * x_b + at[:, None] * x_t + i[None, :], now[:, None] & inside, 0.0)
    before = state_ + (row * (K - 1) + at[:, None] + K - 1) * c + i[None, :]
    return x.to(state_.dtype.element_ty) + tl.load(before, earlier[:, None] & inside, 0.0)


@triton.jit
def conv_forward(
    x_,
    taps_,
    bias_,
    state_,
    doc_,
    y_,
    t,
    c,
    x_b,
    x_t,
    K: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """doc (b, t): the number of document starts up to and with each token, where PACKED."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BT + tl.arange(0, BT)
    i = tl.program_id(2) * BC + tl.arange(0, BC)
    own = s
    if PACKED:
        own = tl.load(doc_ + row * t + s, s < t, 0)
    y = tl.zeros((BT, BC), taps_.dtype.element_ty) + tl.load(bias_ + i, i < c, 0.0)[None, :]
    for j in range(K):
        x = _inputs(x_, state_, doc_, row, s, i, own, j, t, c, x_b, x_t, K, PACKED)
        y += x * tl.load(taps_ + j * c + i, i < c, 0.0)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    at = (row * t + s[:, None]) * c + i[None, :]
    tl.store(y_ + at, y, (s < t)[:, None] & (i < c)[None, :])


@triton.jit
def conv_backward(
    x_,
    taps_,
    bias_,
    state_,
    doc_,
    dy_,
    g_,
    dtaps_,
    dbias_,
    t,
    c,
    x_b,
    x_t,
    K: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """g (b, t, c): the gradient before SiLU. dtaps (parts, K, c), dbias (parts, c), for the parts
    of rows and tokens."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BT + tl.arange(0, BT)
    i = tl.program_id(2) * BC + tl.arange(0, BC)
    part = row * tl.num_programs(1) + tl.program_id(1)
    inside = (s < t)[:, None] & (i < c)[None, :]
    own = s
    if PACKED:
        own = tl.load(doc_ + row * t + s, s < t, 0)
    at = (row * t + s[:, None]) * c + i[None, :]
    g = tl.load(dy_ + at, inside, 0.0)
    if SILU:
        y = tl.zeros((BT, BC), taps_.dtype.element_ty) + tl.load(bias_ + i, i < c, 0.0)[None, :]
        for j in range(K):
            x = _inputs(x_, state_, doc_, row, s, i, own, j, t, c, x_b, x_t, K, PACKED)
            y += x * tl.load(taps_ + j * c + i, i < c, 0.0)[None, :]
        share = 1.0 / (1.0 + tl.exp(-y))
        g = g * share * (1.0 + y * (1.0 - share))
    tl.store(g_ + at, g, inside)
    tl.store(dbias_ + part * c + i, tl.sum(g, 0), i < c)
    for j in range(K):
        x = _inputs(x_, state_, doc_, row, s, i, own, j, t, c, x_b, x_t, K, PACKED)
        tl.store(dtaps_ + (part * K + j) * c + i, tl.sum(g * x, 0), i < c)


@triton.jit
def conv_inputs(
    g_,
    taps_,
    doc_,
    dx_,
    t,
    c,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """dx (b, K - 1 + t, c): the gradients of the state, then of x."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BT + tl.arange(0, BT) - (K - 1)
    i = tl.program_id(2) * BC + tl.arange(0, BC)
    own = s
    if PACKED:
        own = tl.load(doc_ + row * t + s, (s >= 0) & (s < t), 0)
    dx = tl.zeros((BT, BC), taps_.dtype.element_ty)
    for j in range(K):
        to = s + (K - 1) - j  # who took it by tap j
        there = (to >= 0) & (to < t)
        if PACKED:
            there = there & (tl.load(doc_ + row * t + to, there, -1) == own)
        g = tl.load(
            g_ + (row * t + to[:, None]) * c + i[None, :], there[:, None] & (i < c)[None, :], 0.0
        )
        dx += g * tl.load(taps_ + j * c + i, i < c, 0.0)[None, :]
    at = (row * (t + K - 1) + s[:, None] + K - 1) * c + i[None, :]
    tl.store(dx_ + at, dx, (s < t)[:, None] & (i < c)[None, :])


@proven
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_ref`: the same arguments, results and errors. Filters of more than LONGEST
    taps and further derivatives are those of the torch form."""
    if weight.shape[-1] > LONGEST:
        return torch_form.causal_conv1d(x, weight, bias, state, starts, silu=silu)
    _, taps, bias, before = torch_form._prepare(x, weight, bias, state, starts)
    rows, ends = launch.rows(x), (taps.contiguous(), bias.contiguous(), before.contiguous())
    given = (rows, *ends, starts, silu)
    differentiable = launch.differentiable(x, taps, bias, before)
    y = _Conv.apply(*given) if differentiable else _forward(*given)
    return y.to(x.dtype), torch_form.last_inputs(x, before, starts)


def _grid(b: int, t: int, c: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    bt, bc = launch.block(t, TOKENS), launch.block(c, CHANNELS)
    return (b, launch.blocks(t, bt), launch.blocks(c, bc)), {"BT": bt, "BC": bc}


def _documents(x: Tensor, starts: Tensor | None) -> Tensor:
    """The number of each token's document; x where there are none."""
    return x if starts is None else starts.cumsum(1, dtype=torch.int32)


def _forward(
    x: Tensor, taps: Tensor, bias: Tensor, before: Tensor, starts: Tensor | None, silu: bool
) -> Tensor:
    (b, t, c), y = x.shape, taps.new_empty(x.shape)
    grid, blocks = _grid(b, t, c)
    options = {"K": len(taps), "SILU": silu, "PACKED": starts is not None, **blocks}
    given = (x, taps, bias, before, _documents(x, starts))
    launch.run(conv_forward, grid, *given, y, t, c, *launch.strides(x), **options)
    return y


class _Conv(torch.autograd.Function):
    """The kernels, and beyond a plain backward the definition."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        taps: Tensor,
        bias: Tensor,
        before: Tensor,
        starts: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, taps, bias, before, starts)
        ctx.silu = silu
        return _forward(x, taps, bias, before, starts, silu)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, taps, bias, before, starts = ctx.saved_tensors
        if autodiff.too_narrow(dy):
            foreign = torch_form._foreign(starts, len(taps))
            wide = (x.to(taps.dtype), taps, bias, before, foreign, ctx.silu)
            return autodiff.gradients(torch_form._by_taps, wide, (dy,))
        documents = _documents(x, starts)
        (b, t, c), k = x.shape, len(taps)
        grid, blocks = _grid(b, t, c)
        options = {"K": k, "PACKED": starts is not None, **blocks}
        g, dx = taps.new_empty(b, t, c), taps.new_empty(b, k - 1 + t, c)
        dtaps, dbias = taps.new_empty(b * grid[1], k, c), taps.new_empty(b * grid[1], c)
        given = [x, taps, bias, before, documents, dy.contiguous()]
        to, blocks = _grid(b, k - 1 + t, c)
        launch.run(
            conv_backward,
            grid,
            *given,
            g,
            dtaps,
            dbias,
            t,
            c,
            *launch.strides(x),
            SILU=ctx.silu,
            **options,
        )
        launch.run(conv_inputs, to, g, taps, documents, dx, t, c, **{**options, **blocks})
        dbefore, dx = dx[:, : k - 1], dx[:, k - 1 :].to(x.dtype)
        return dx, dtaps.sum(0), dbias.sum(0), dbefore, None, None
