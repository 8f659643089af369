"""`decay_scan` in C, on a CPU; symbols as there. decay.c says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import decay_scan as torch_form
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.native import library
from kizzasi.models.ops.precision import full_precision


def decay_scan(
    log_a: Tensor, u: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decay_scan_ref`: the same arguments and results."""
    log_a, u = full_precision(log_a), full_precision(u)
    wide = torch.promote_types(log_a.dtype, u.dtype)
    log_a, u = log_a.to(wide), u.to(wide)
    h0 = torch.zeros_like(u[:, 0]) if h0 is None else h0.to(u.dtype)
    packed = None if starts is None else starts.contiguous()

    def run(u: Tensor, log_a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        given = (library.rows(log_a), library.rows(u), h0.contiguous(), packed)
        if library.differentiable(log_a, u, h0):
            return _Decay.apply(*given)
        h = _forward(*given)
        return h, h[:, -1].clone()

    return isolated(run, starts, (u,), (log_a,), (h0,))


def _forward(log_a: Tensor, u: Tensor, h0: Tensor, starts: Tensor | None) -> Tensor:
    h = u.new_empty(u.shape)
    library.call("decay_forward", u.dtype, [log_a, u, h0, starts, h], *_sizes(log_a, u))
    return h


def _sizes(log_a: Tensor, u: Tensor) -> list[int]:
    strides = [x.stride(i) for x in (log_a, u) for i in (0, 1)]
    return [*u.shape, *strides, library.threads(4 * u.numel())]


def _plain(log_a: Tensor, u: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    a = log_a.exp()
    h = torch_form._scan(a if starts is None else a.masked_fill(starts[..., None], 0.0), u, h0)
    return h, h[:, -1]


class _Decay(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, log_a: Tensor, u: Tensor, h0: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h = _forward(log_a, u, h0, starts)
        ctx.save_for_backward(log_a, h0, starts, h, u)
        return h, h[:, -1].clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dh: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        log_a, h0, starts, h, u = ctx.saved_tensors
        if autodiff.too_narrow(dh, dlast):
            return autodiff.gradients(_plain, (log_a, u, h0, starts), (dh, dlast))
        dlog_a, du, dh0 = u.new_empty(u.shape), u.new_empty(u.shape), torch.empty_like(h0)
        given = [log_a, None, h0, starts, h, dh.contiguous(), dlast.contiguous()]
        library.call("decay_backward", u.dtype, [*given, dlog_a, du, dh0], *_sizes(log_a, h))
        return dlog_a, du, dh0, None
