"""`causal_conv1d` in C, on a CPU; symbols as there. conv.c says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import conv as torch_form
from kizzasi.models.ops.native import library

LONGEST = 32  # taps; longer filters are the torch form's


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
    x_, taps, bias, before = torch_form._prepare(x, weight, bias, state, starts)
    if library.differentiable(x_, taps, bias, before):
        y = _Conv.apply(x_, taps, bias, before, starts, silu)
    else:
        y = _forward(x_, taps, bias, before, starts, silu)
    return y.to(x.dtype), torch_form.last_inputs(x, before, starts)


def _forward(
    x: Tensor, taps: Tensor, bias: Tensor, before: Tensor, starts: Tensor | None, silu: bool
) -> Tensor:
    x, taps, bias, before = (
        library.rows(x),
        taps.contiguous(),
        bias.contiguous(),
        before.contiguous(),
    )
    starts = None if starts is None else starts.contiguous()
    y = x.new_empty(x.shape)
    sizes = _sizes(x, taps, x, silu)
    library.call("conv_forward", x.dtype, [x, taps, bias, before, starts, y], *sizes)
    return y


def _sizes(x: Tensor, taps: Tensor, dy: Tensor, silu: bool) -> list[int]:
    threads = library.threads(x.numel() * len(taps))
    strides = [v.stride(i) for v in (x, dy) for i in (0, 1)]
    return [*x.shape, len(taps), *strides, int(silu), threads]


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
            given = (x, taps, bias, before, foreign, ctx.silu)
            return autodiff.gradients(torch_form._by_taps, given, (dy,))
        x, dy, taps, bias = library.rows(x), library.rows(dy), taps.contiguous(), bias.contiguous()
        before, starts = before.contiguous(), None if starts is None else starts.contiguous()
        dx, dbefore = x.new_empty(x.shape), torch.empty_like(before)
        dtaps, dbias = x.new_empty(len(x), *taps.shape), x.new_empty(len(x), *bias.shape)
        tensors = [x, taps, bias, before, starts, dx, dtaps, dbias, dbefore, dy]
        library.call("conv_backward", x.dtype, tensors, *_sizes(x, taps, dy, ctx.silu))
        return dx, dtaps.sum(0), dbias.sum(0), dbefore, None, None
