"""`s4d_scan` and `s4_scan` in C, on a CPU: one token after another, which costs O(t n) and needs no
convolution. oscillators.c says how.

Symbols: b batch, t time, d channels, n states; the maps a, B, C and, of S4, g and r, (d, n):

    s = Re sum_n r_n h_n[t-1],    h[t] = a h[t-1] + B u[t] - g s,    y[t] = Re sum_n C_n h_n[t]

S4's step h + 2 (1 - A)^-1 (A h + B u), with A = Lambda - P P*, is of that form (Woodbury): with
Q = 1 / (1 - Lambda), a = (1 + Lambda) Q, g = 2 Q P and r = 2 Q P* / (1 + <P*, Q P>).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff, dplr, s4
from kizzasi.models.ops.dplr import DPLR
from kizzasi.models.ops.native import library
from kizzasi.models.ops.precision import in_full_precision

Maps = tuple[Tensor, ...]


class How(NamedTuple):
    """maps: of a system's parameters, a, B, C and, where there are, g and r. plain: the torch form,
    of u, the parameters, the state before and starts."""

    maps: Callable[..., Maps]
    plain: Callable[..., tuple[Tensor, Tensor]]


def _s4_maps(*parameters: Tensor) -> Maps:
    system = DPLR(*parameters)
    Q = 1 / (1 - system.A)
    QP, away = Q * system.P, system.P.conj()
    seen = 1 + dplr._pair(away, QP)
    a, B = (1 + system.A) * Q, 2 * dplr._solve(system, system.B)
    return a, B, 2 * system.C, 2 * QP, 2 * Q * away / seen


def _s4_plain(u: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    *system, h0, starts = given
    return dplr.s4_scan(u, DPLR(*system), h0, starts)


S4D = How(lambda *maps: maps, s4.s4d_scan)
S4 = How(_s4_maps, _s4_plain)


@in_full_precision
def s4d_scan(
    u: Tensor,
    Abar: Tensor,
    Bbar: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`s4d_scan_ref`: the same arguments and results."""
    if Abar.is_complex():
        return _run(S4D, u, (Abar, Bbar, C), h0, starts)
    wide = [torch.complex(x, torch.zeros_like(x)) for x in (Abar, Bbar, C)]
    h0 = None if h0 is None else torch.complex(h0, torch.zeros_like(h0))
    y, h = _run(S4D, u, tuple(wide), h0, starts)
    return y, h.real


@in_full_precision
def s4_scan(
    u: Tensor, system: DPLR, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`s4_scan_ref`: the same arguments and results."""
    return _run(S4, u, system, h0, starts)


def _run(
    how: How, u: Tensor, system: Maps, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, system[0].dtype.to_real())
    u, system = u.to(wide), tuple(x.to(wide.to_complex()) for x in system)
    if h0 is None:
        h0 = system[0].new_zeros(len(u), *system[0].shape)
    packed = None if starts is None else starts.contiguous()
    given = (library.rows(u), *system, h0.to(system[0].dtype), packed)
    if library.differentiable(*given[:-1]):
        return _Oscillators.apply(how, *given)
    y, h, _ = _forward(how.maps(*system), given, False)
    return y, h


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj().contiguous())


def _inputs(maps: Maps, given: Any) -> tuple[list[Tensor | None], list[int]]:
    """What both kernels take: the maps, u, the state before and starts; and sizes."""
    u, *_, h0, starts = given
    (b, t, d), n = u.shape, 2 * h0.shape[-1]
    both = [*map(_real, maps), *[None] * (5 - len(maps))]
    sizes = [b, t, d, n, u.stride(0), u.stride(1), library.threads(4 * b * t * d * n)]
    return [*both, u, _real(h0), starts], sizes


def _forward(maps: Maps, given: Any, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last state, and where `keep` the states before blocks."""
    inputs, sizes = _inputs(maps, given)
    u, before = given[0], None
    b, t, d, n, *_ = sizes
    if keep:
        (steps,) = library.ask("oscillators_sizes", u.dtype, 1, *sizes)
        wide = library.lanes(u.dtype)
        before = u.new_empty(-(-t // steps), b, -(-d // wide), n, wide)
    y, last = u.new_empty(b, t, d), u.new_empty(b, d, n // 2, 2)
    library.call("oscillators_forward", u.dtype, [*inputs, before, y, last], *sizes)
    return y, torch.view_as_complex(last), before


class _Oscillators(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(ctx: Any, how: How, *given: Any) -> tuple[Tensor, Tensor]:
        y, last, before = _forward(how.maps(*given[1:-2]), given, True)
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
        with torch.enable_grad():
            system = [x.detach().requires_grad_() for x in given[1:-2]]
            maps = ctx.how.maps(*system)
        inputs, sizes = _inputs(tuple(x.detach() for x in maps), given)
        u, h0 = given[0], inputs[6]
        assert h0 is not None
        du, dh0 = u.new_empty(u.shape), torch.empty_like(h0)
        dmaps = h0.new_empty(len(maps), *h0.shape)
        results = [dy.contiguous(), _real(dlast), du, dh0, *dmaps]
        with library.using(ctx.isa):  # the states are laid out for it
            library.call("oscillators_backward", u.dtype, [*inputs, before, *results], *sizes)
        of_maps = torch.view_as_complex(dmaps.sum(1)).unbind()
        return None, du, *_of_system(maps, system, of_maps), torch.view_as_complex(dh0), None


def _of_system(maps: Maps, system: list[Tensor], grads: Maps) -> Maps:
    if all(x is y for x, y in zip(maps, system, strict=False)):
        return grads
    return torch.autograd.grad(maps, system, grads)
