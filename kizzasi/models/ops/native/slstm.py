"""`slstm` in C, on a CPU; symbols as there. slstm.c says how.

What the gates see of the outputs depends on nothing but outputs, which backward knows: it is one
product for all tokens, and so is the gradient of R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops import slstm as torch_form
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.native import library
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.slstm import SLSTMMemory


def slstm(
    x: Tensor, R: Tensor, memory: SLSTMMemory | None = None, starts: Tensor | None = None
) -> tuple[Tensor, SLSTMMemory]:
    """`slstm_ref`: the same arguments and results."""
    x, R = full_precision(x), full_precision(R)
    wide = torch.promote_types(x.dtype, R.dtype)
    x, R = x.to(wide), R.to(wide).contiguous()
    if memory is None:
        zeros = torch.zeros_like(x[:, 0, 0])
        memory = SLSTMMemory(zeros, zeros, zeros, zeros)
    packed = None if starts is None else starts.contiguous()

    def run(x: Tensor, *cells: Tensor) -> tuple[Tensor, SLSTMMemory]:
        given = (x.contiguous(), R, *(cell.to(wide).contiguous() for cell in cells), packed)
        if library.differentiable(*given[:-1]):
            y, *after = _Cells.apply(*given)
        else:
            y, *after = _forward(given, 1)
            after = [cell[:, -1] for cell in after]
        return y, SLSTMMemory(y[:, -1].clone(), *after)

    return isolated(run, starts, (x,), (), memory)


def _sizes(x: Tensor, kept: int) -> list[int]:
    b, t, _, h, n = x.shape
    return [b, t, h, n, kept, library.threads(4 * b * t * h * n * n)]


def _forward(given: tuple[Tensor | None, ...], kept: int) -> list[Tensor]:
    """y (b, t, h, n), and c, n, m (b, kept, h, n): after every token, or after the last."""
    x = given[0]
    assert x is not None
    b, t, _, h, n = x.shape
    out = [x.new_empty(b, tokens, h, n) for tokens in (t, kept, kept, kept)]
    library.call("slstm_forward", x.dtype, [*given, *out], *_sizes(x, kept))
    return out


def _plain(x: Tensor, R: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *cells, starts = rest
    y, memory = torch_form.slstm_ref(x, R, SLSTMMemory(*cells), starts)
    return y, *memory[1:]


def _before(y: Tensor, y0: Tensor, starts: Tensor | None) -> Tensor:
    """(h, b t, n) the outputs that the gates of every token see."""
    seen = torch.cat([y0[:, None], y[:, :-1]], 1)
    if starts is not None:
        seen = seen.masked_fill(starts[:, :, None, None], 0.0)
    return seen.permute(2, 0, 1, 3).flatten(1, 2)


class _Cells(torch.autograd.Function):
    """The kernels, and beyond a plain backward the loop."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        x = given[0]
        y, *cells = _forward(given, x.shape[1])
        ctx.save_for_backward(*given, y, *cells)
        return y, *(cell[:, -1].clone() for cell in cells)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        *given, y, c, n, m = ctx.saved_tensors
        if autodiff.too_narrow(*grads):
            return autodiff.gradients(_plain, given, grads)
        x, R, *start, starts = given
        seen = _before(y, start[0], starts)
        products = seen @ R.permute(1, 2, 0, 3).flatten(2)  # (h, b t, 4 n)
        dx, ends = torch.empty_like(x), [torch.empty_like(cell) for cell in start]
        results = [*(g.contiguous() for g in grads), products, dx, *ends]
        tensors = [*given, y, c, n, m, *results]
        library.call("slstm_backward", x.dtype, tensors, *_sizes(x, x.shape[1]))
        by_head = dx.permute(3, 0, 1, 2, 4).flatten(1, 2).flatten(2)  # (h, b t, 4 n)
        dR = (seen.mT @ by_head).unflatten(2, (4, -1)).permute(2, 0, 1, 3)
        return dx, dR, *ends, None
