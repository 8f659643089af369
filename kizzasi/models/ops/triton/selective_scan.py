"""`selective_scan` in Triton, on CUDA; symbols as there.

A program is one batch row and BD channels; h (BD, N) stays in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import selective_scan as torch_form
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.triton import launch
from kizzasi.models.ops.triton.first_use import proven
from kizzasi.models.ops.triton.launch import STEPS

CHANNELS = 32  # of a program


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def scan_forward(
    u_,
    dt_,
    A_,
    B_,
    C_,
    D_,
    h0_,
    z_,
    starts_,
    before_,
    y_,
    last_,
    t,
    d,
    n,
    u_b,
    u_t,
    dt_b,
    dt_t,
    B_b,
    B_t,
    C_b,
    C_t,
    z_b,
    z_t,
    GATED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    STEPS: tl.constexpr,
    BD: tl.constexpr,
    N: tl.constexpr,
):
    """before (b, blocks of STEPS tokens, d, n): the memory at each one's beginning, where KEEP."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BD + tl.arange(0, BD)
    j = tl.arange(0, N)
    in_d, in_n = i < d, j < n
    both = in_d[:, None] & in_n[None, :]
    at = i[:, None] * n + j[None, :]
    A = tl.load(A_ + at, both, 0.0)
    D = tl.load(D_ + i, in_d, 0.0)
    h = tl.load(h0_ + row * d * n + at, both, 0.0)
    u_ += row * u_b + i
    dt_ += row * dt_b + i
    B_ += row * B_b + j
    C_ += row * C_b + j
    z_ += row * z_b + i
    y_ += row * t * d + i
    blocks = tl.cdiv(t, STEPS)
    for s in range(t):
        if KEEP and s % STEPS == 0:
            tl.store(before_ + (row * blocks + s // STEPS) * d * n + at, h, both)
        if PACKED:
            h = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, h)
        u = tl.load(u_ + s * u_t, in_d, 0.0).to(A.dtype)
        dt = tl.load(dt_ + s * dt_t, in_d, 0.0).to(A.dtype)
        B = tl.load(B_ + s * B_t, in_n, 0.0).to(A.dtype)
        C = tl.load(C_ + s * C_t, in_n, 0.0).to(A.dtype)
        if SOFTPLUS:
            dt = _softplus(dt)
        h = tl.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B[None, :]
        y = tl.sum(h * C[None, :], 1) + D * u
        if GATED:
            z = tl.load(z_ + s * z_t, in_d, 0.0).to(A.dtype)
            y = y * z * _sigmoid(z)
        tl.store(y_ + s * d, y, in_d)
    tl.store(last_ + row * d * n + at, h, both)


@triton.jit
def scan_backward(
    u_,
    dt_,
    A_,
    B_,
    C_,
    D_,
    z_,
    starts_,
    before_,
    dy_,
    dlast_,
    history_,
    du_,
    ddt_,
    dA_,
    dB_,
    dC_,
    dD_,
    dh0_,
    dz_,
    t,
    d,
    n,
    u_b,
    u_t,
    dt_b,
    dt_t,
    B_b,
    B_t,
    C_b,
    C_t,
    z_b,
    z_t,
    GATED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    STEPS: tl.constexpr,
    BD: tl.constexpr,
    N: tl.constexpr,
):
    """Block after block of STEPS tokens from the end: ahead once more, the memory before each token
    into history (programs, STEPS, BD, N), and back. dA (b, d, n), dD (b, d); dB, dC (parts, b, t,
    n) for the parts of the channels."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BD + tl.arange(0, BD)
    j = tl.arange(0, N)
    in_d, in_n = i < d, j < n
    both = in_d[:, None] & in_n[None, :]
    at = i[:, None] * n + j[None, :]
    A = tl.load(A_ + at, both, 0.0)
    D = tl.load(D_ + i, in_d, 0.0)
    g = tl.load(dlast_ + row * d * n + at, both, 0.0)
    dA = tl.zeros_like(A)
    dD = tl.zeros_like(D)
    u_ += row * u_b + i
    dt_ += row * dt_b + i
    B_ += row * B_b + j
    C_ += row * C_b + j
    z_ += row * z_b + i
    to = row * t * d + i
    summed = (part * tl.num_programs(0) + row) * t * n + j
    place = (row * tl.num_programs(1) + part) * STEPS * BD * N
    place += tl.arange(0, BD)[:, None] * N + j[None, :]
    blocks = tl.cdiv(t, STEPS)
    for k in range(blocks):
        first = (blocks - 1 - k) * STEPS
        end = tl.minimum(first + STEPS, t)
        h = tl.load(before_ + (row * blocks + blocks - 1 - k) * d * n + at, both, 0.0)
        for s in range(first, end):
            if PACKED:
                h = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, h)
            tl.store(history_ + place + (s - first) * BD * N, h)
            u = tl.load(u_ + s * u_t, in_d, 0.0).to(A.dtype)
            dt = tl.load(dt_ + s * dt_t, in_d, 0.0).to(A.dtype)
            B = tl.load(B_ + s * B_t, in_n, 0.0).to(A.dtype)
            if SOFTPLUS:
                dt = _softplus(dt)
            h = tl.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B[None, :]
        tl.debug_barrier()
        for back in range(end - first):
            s = end - 1 - back
            u = tl.load(u_ + s * u_t, in_d, 0.0).to(A.dtype)
            raw = tl.load(dt_ + s * dt_t, in_d, 0.0).to(A.dtype)
            B = tl.load(B_ + s * B_t, in_n, 0.0).to(A.dtype)
            C = tl.load(C_ + s * C_t, in_n, 0.0).to(A.dtype)
            dy = tl.load(dy_ + to + s * d, in_d, 0.0).to(A.dtype)
            dt = raw
            if SOFTPLUS:
                dt = _softplus(raw)
            old = tl.load(history_ + place + (s - first) * BD * N)
            decay = tl.exp(dt[:, None] * A)
            h = decay * old + (dt * u)[:, None] * B[None, :]
            if GATED:
                z = tl.load(z_ + s * z_t, in_d, 0.0).to(A.dtype)
                share = _sigmoid(z)
                y = tl.sum(h * C[None, :], 1) + D * u
                tl.store(dz_ + to + s * d, dy * y * share * (1.0 + z * (1.0 - share)), in_d)
                dy = dy * z * share
            g += dy[:, None] * C[None, :]
            tl.store(dC_ + summed + s * n, tl.sum(dy[:, None] * h, 0), in_n)
            tl.store(dB_ + summed + s * n, tl.sum(g * (dt * u)[:, None], 0), in_n)
            dx = tl.sum(g * B[None, :], 1)
            fading = g * decay * old
            ddt = tl.sum(fading * A, 1) + dx * u
            if SOFTPLUS:
                ddt = ddt * _sigmoid(raw)
            tl.store(du_ + to + s * d, dx * dt + D * dy, in_d)
            tl.store(ddt_ + to + s * d, ddt, in_d)
            dA += fading * dt[:, None]
            dD += dy * u
            g = g * decay
            if PACKED:
                g = tl.where(tl.load(starts_ + row * t + s) != 0, 0.0, g)
        tl.debug_barrier()
    tl.store(dA_ + row * d * n + at, dA, both)
    tl.store(dD_ + row * d + i, dD, in_d)
    tl.store(dh0_ + row * d * n + at, g, both)


@proven
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_ref`: the same arguments, results and errors. Further derivatives are those
    of the torch form."""
    streams = (u, dt, B, C) if gate is None else (u, dt, B, C, gate)
    _, _, A, _, _, D, h0 = torch_form._prepare(u, dt, A, B, C, D, h0, starts, gate)
    packed = None if starts is None else starts.contiguous()

    def run(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        z, h0 = more if len(more) == 2 else (None, *more)
        rows = [None if x is None else launch.rows(x) for x in (u, dt, B, C, z)]
        ends = [x.contiguous() for x in (A, D, h0)]
        given = (*rows[:2], ends[0], *rows[2:4], *ends[1:], rows[4], packed, softplus)
        if launch.differentiable(*rows, *ends):
            return _Scan.apply(*given)
        y, h, _ = _forward(given, False)
        return y, h

    y, h = isolated(run, starts, streams, (), (h0,))
    return y.to(u.dtype), h


def _plain(*given: Any) -> tuple[Tensor, Tensor]:
    """The same in torch operations, for what the kernels cannot do."""
    u, dt, A, B, C, D, h0, z, starts, softplus = given
    u, dt, B, C = (x.to(A.dtype) for x in (u, dt, B, C))
    dt = F.softplus(dt) if softplus else dt
    y, h = torch_form.selective_scan_chunked(u, dt, A, B, C, D, h0, starts)
    return torch_form._gated(y, z), h


def _sizes(given: Sequence[Any]) -> tuple[tuple[int, int], list[int], dict[str, Any]]:
    """The grid, sizes and strides, and what a kernel is compiled for."""
    u, dt, A, B, C, _, _, z, starts, softplus = given
    (b, t, d), n = u.shape, A.shape[1]
    bd = launch.block(d, CHANNELS)
    sizes = [t, d, n, *launch.strides(u, dt, B, C, u if z is None else z)]
    flags = {"GATED": z is not None, "SOFTPLUS": bool(softplus), "PACKED": starts is not None}
    options = {**flags, "STEPS": STEPS, "BD": bd, "N": launch.padded(n)}
    return (b, launch.blocks(d, bd)), sizes, options


def _forward(given: Sequence[Any], keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last h, and where `keep` the memories before blocks."""
    u, _, A, _, _, _, _, z, starts, _ = given
    grid, sizes, options = _sizes(given)
    (b, t, d), n = u.shape, A.shape[1]
    y, last = A.new_empty(b, t, d), A.new_empty(b, d, n)
    before = A.new_empty(b, launch.blocks(t, STEPS), d, n) if keep else None
    packed = u if starts is None else starts.view(torch.uint8)
    tensors = [*given[:7], u if z is None else z, packed]
    launch.run(
        scan_forward,
        grid,
        *tensors,
        y if before is None else before,
        y,
        last,
        *sizes,
        KEEP=keep,
        **options,
    )
    return y, last, before


class _Scan(torch.autograd.Function):
    """The kernels, and beyond a plain backward `_plain`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        y, last, before = _forward(given, True)
        ctx.softplus = given[-1]
        ctx.save_for_backward(*given[:-1], before)
        return y, last

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        *given, before = ctx.saved_tensors
        if autodiff.too_narrow(dy, dlast):
            return autodiff.gradients(_plain, (*given, ctx.softplus), (dy, dlast))
        u, dt, A, B, C, D, h0, z, starts = given
        grid, sizes, options = _sizes([*given, ctx.softplus])
        (b, t, d), n, parts = u.shape, A.shape[1], grid[1]
        du, ddt, dz = A.new_empty(3, b, t, d)
        dA, dD, dh0 = A.new_empty(b, d, n), A.new_empty(b, d), torch.empty_like(h0)
        dB, dC = A.new_empty(2, parts, b, t, n)
        history = A.new_empty(b * parts, STEPS, options["BD"], options["N"])
        packed = u if starts is None else starts.view(torch.uint8)
        tensors = [u, dt, A, B, C, D, u if z is None else z, packed, before]
        tensors += [dy.contiguous(), dlast.contiguous(), history]
        launch.run(
            scan_backward, grid, *tensors, du, ddt, dA, dB, dC, dD, dh0, dz, *sizes, **options
        )
        dA, dB, dC, dD = (x[0] if len(x) == 1 else x.sum(0) for x in (dA, dB, dC, dD))
        du, ddt, dB, dC = (g.to(x.dtype) for g, x in ((du, u), (ddt, dt), (dB, B), (dC, C)))
        dz = None if z is None else dz.to(z.dtype)
        return du, ddt, dA, dB, dC, dD, dh0, dz, None, None
