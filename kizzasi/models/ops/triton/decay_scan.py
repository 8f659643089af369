"""`decay_scan` in Triton, on CUDA; symbols as there.

A program is one batch row and some channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import decay_scan as torch_form
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.triton import launch
from kizzasi.models.ops.triton.first_use import proven

CHANNELS = 128  # of a program


@triton.jit
def decay_forward(
    log_a_, u_, h0_, starts_, y_, t, d, a_b, a_t, u_b, u_t, PACKED: tl.constexpr, BD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = i < d
    h = tl.load(h0_ + row * d + i, inside, 0.0)
    for s in range(t):
        if PACKED:
            h = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, h)
        log_a = tl.load(log_a_ + row * a_b + s * a_t + i, inside, 0.0)
        h = tl.exp(log_a) * h + tl.load(u_ + row * u_b + s * u_t + i, inside, 0.0)
        tl.store(y_ + (row * t + s) * d + i, h, inside)


@triton.jit
def decay_backward(
    log_a_,
    h0_,
    starts_,
    y_,
    dy_,
    da_,
    du_,
    dh0_,
    t,
    d,
    a_b,
    a_t,
    PACKED: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = i < d
    h0 = tl.load(h0_ + row * d + i, inside, 0.0)
    g = tl.zeros_like(h0)
    for back in range(t):
        s = t - 1 - back
        at = (row * t + s) * d + i
        g += tl.load(dy_ + at, inside, 0.0)
        tl.store(du_ + at, g, inside)
        g = g * tl.exp(tl.load(log_a_ + row * a_b + s * a_t + i, inside, 0.0))
        old = h0
        if s > 0:
            old = tl.load(y_ + at - d, inside, 0.0)
        if PACKED:
            first = tl.load(starts_ + row * t + s) != 0
            g = tl.where(first, 0.0, g)
        tl.store(da_ + at, tl.where(g == 0.0, 0.0, g * old), inside)
    tl.store(dh0_ + row * d + i, g, inside)


@proven
def decay_scan(
    log_a: Tensor, u: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decay_scan_ref`: the same arguments and results. Further derivatives are those of the torch
    form."""
    log_a, u = full_precision(log_a), full_precision(u)
    h0 = torch.zeros_like(u[:, 0]) if h0 is None else h0.to(u.dtype)
    packed = None if starts is None else starts.contiguous()

    def run(u: Tensor, log_a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        given = (launch.rows(log_a.to(u.dtype)), launch.rows(u), h0.contiguous(), packed)
        y = _Scan.apply(*given) if launch.differentiable(*given) else _forward(*given)
        return y, y[:, -1]

    return isolated(run, starts, (u,), (log_a,), (h0,))


def _plain(log_a: Tensor, u: Tensor, h0: Tensor, starts: Tensor | None) -> Tensor:
    return torch_form.decay_scan(log_a, u, h0, starts)[0]


def _grid(u: Tensor) -> tuple[tuple[int, int], int]:
    bd = launch.block(u.shape[2], CHANNELS)
    return (u.shape[0], launch.blocks(u.shape[2], bd)), bd


def _forward(log_a: Tensor, u: Tensor, h0: Tensor, starts: Tensor | None) -> Tensor:
    y, (grid, bd) = u.new_empty(u.shape), _grid(u)
    packed = u if starts is None else starts.view(torch.uint8)
    sizes = [*u.shape[1:], *launch.strides(log_a, u)]
    launch.run(
        decay_forward, grid, log_a, u, h0, packed, y, *sizes, PACKED=starts is not None, BD=bd
    )
    return y


class _Scan(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, log_a: Tensor, u: Tensor, h0: Tensor, starts: Tensor | None
    ) -> Tensor:
        y = _forward(log_a, u, h0, starts)
        ctx.save_for_backward(log_a, u, h0, starts, y)
        return y

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        log_a, u, h0, starts, y = ctx.saved_tensors
        if autodiff.too_narrow(dy):
            return autodiff.gradients(_plain, (log_a, u, h0, starts), (dy,))
        grid, bd = _grid(u)
        packed = u if starts is None else starts.view(torch.uint8)
        (da, du), dh0 = u.new_empty(2, *u.shape), u.new_empty(h0.shape)
        sizes = [*u.shape[1:], *launch.strides(log_a)]
        launch.run(
            decay_backward,
            grid,
            log_a,
            h0,
            packed,
            y,
            dy.contiguous(),
            da,
            du,
            dh0,
            *sizes,
            PACKED=starts is not None,
            BD=bd,
        )
        return da, du, dh0, None
