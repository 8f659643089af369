"""`selective_scan` in C, on a CPU; symbols as there. scan.c says how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import selective_scan as torch_form
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.native import library


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
    u_, dt, A, B, C, D, h0 = torch_form._prepare(u, dt, A, B, C, D, h0, starts, gate)
    packed = None if starts is None else starts.contiguous()
    tokens = (u_, dt, B, C) if gate is None else (u_, dt, B, C, gate.to(u_.dtype))

    def run(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        z, h0 = more if len(more) == 2 else (None, *more)
        u, dt, B, C = map(library.rows, (u, dt, B, C))
        z = None if z is None else library.rows(z)
        ends = (A.contiguous(), D.contiguous(), h0.contiguous())
        given = (u, dt, ends[0], B, C, *ends[1:], z, packed, softplus)
        if library.differentiable(u, dt, A, B, C, D, h0, z):
            return _Scan.apply(*given)
        y, h, _ = _forward(given, False)
        return y, h

    y, h = isolated(run, starts, tokens, (), (h0,))
    return y.to(u.dtype), h


def _sizes(*given: Tensor | bool | None) -> tuple[list[Tensor | None], list[int]]:
    """What both kernels take: the inputs, and their sizes and strides."""
    u, dt, A, B, C, D, h0, z, starts, softplus = given
    assert isinstance(u, Tensor)
    assert isinstance(A, Tensor)
    (b, t, d), n = u.shape, A.shape[1]
    streams = [x for x in (u, dt, B, C, u if z is None else z) if isinstance(x, Tensor)]
    strides = [x.stride(i) for x in streams for i in (0, 1)]
    threads = library.threads(b * t * d * n)
    inputs: list[Any] = [u, dt, A, B, C, D, h0, z, starts]
    return inputs, [b, t, d, n, *strides, int(bool(softplus)), threads]


def _plain(*given: Any) -> tuple[Tensor, Tensor]:
    """The same in torch operations, for what the kernels cannot do."""
    u, dt, A, B, C, D, h0, z, starts, softplus = given
    dt = F.softplus(dt) if softplus else dt
    y, h = torch_form.selective_scan_chunked(u, dt, A, B, C, D, h0, starts)
    return torch_form._gated(y, z), h


def _forward(given: Sequence[Any], keep: bool) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """y, the last h, and where `keep` what backward needs: inputs and states before blocks."""
    u, _, A, *_ = given
    inputs, sizes = _sizes(*given)
    (b, t, d), n = u.shape, A.shape[1]
    before = None
    if keep:
        steps, _ = library.ask("scan_sizes", u.dtype, 2, *sizes)
        wide = library.lanes(u.dtype)
        before = u.new_empty(-(-t // steps), b, -(-d // wide), n, wide)
    y, last = u.new_empty(b, t, d), u.new_empty(b, d, n)
    library.call("scan_forward", u.dtype, [*inputs, before, y, last], *sizes)
    return y, last, [*inputs, before]


class _Scan(torch.autograd.Function):
    """The kernels, and beyond a plain backward `_plain`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        y, last, kept = _forward(given, True)
        ctx.softplus, ctx.isa = given[-1], library.instruction_set()
        ctx.save_for_backward(*kept)
        return y, last

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        *given, before = ctx.saved_tensors
        if autodiff.too_narrow(dy, dlast):
            return autodiff.gradients(_plain, (*given, ctx.softplus), (dy, dlast))
        inputs, sizes = _sizes(*given, ctx.softplus)
        u, _, A, B, _, D, h0, z, _ = given
        b, t, d = u.shape
        _, parts = library.ask("scan_sizes", u.dtype, 2, *sizes)
        dy, dlast = dy.contiguous(), dlast.contiguous()
        du, ddt = u.new_empty(2, b, t, d)
        dA, dD, dh0 = u.new_empty(b, *A.shape), u.new_empty(b, *D.shape), torch.empty_like(h0)
        dB, dC = u.new_empty(2, parts, *B.shape)
        dz = None if z is None else u.new_empty(b, t, d)
        results = [dy, dlast, du, ddt, dA, dB, dC, dD, dh0, dz]
        with library.using(ctx.isa):  # the states are laid out for it
            library.call("scan_backward", u.dtype, [*inputs, before, *results], *sizes)
        dA, dB, dC, dD = (x[0] if len(x) == 1 else x.sum(0) for x in (dA, dB, dC, dD))
        return du, ddt, dA, dB, dC, dD, dh0, dz, None, None
