"""Diagonal linear time-invariant state spaces: every channel a bank of damped oscillators.

    h'(t) = A h(t) + u(t),    y(t) = Re sum_n C_n h_n(t)        (section 3; B = 1 is folded into C)

    A      (d, n) diagonal of the state matrix, complex, or real without oscillation
    Abar   (d, n) what a state keeps of itself in one token
    Bbar   (d, n) what it takes from the input
    C      (d, n) readout; for conjugate pairs the caller doubles it, since only one of each is kept
    h      (b, d, n) state, u and y (b, t, d)
    c      tokens in a block, a power of two near sqrt(t); j = ceil(t / c) blocks

Complex and real systems take the same path: Re is the identity on real tensors.

Source: Gu, Gupta, Goel & Re 2022, arXiv:2206.11893.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision

S4DInit = Literal["lin", "inv", "legs", "real"]
Discretization = Literal["zoh", "bilinear"]


def s4d_poles(init: S4DInit, d_state: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of A at the start, float64; of each conjugate pair the upper one.

        lin   -1/2 + i pi n              n = 0 .. d_state / 2 - 1
        inv   -1/2 + i N / pi (N / (2 n + 1) - 1),    N = d_state
        legs  eigenvalues of the normal part of HiPPO-LegS: -1/2 + i w
        real  -(n + 1)                   n = 0 .. d_state - 1

    Returns:
        two (d_state / 2,), or for "real" (d_state,) and an empty tensor.

    Source: arXiv:2206.11893, section 4; HiPPO-LegS: Gu et al. 2020, arXiv:2008.07669.
    """
    n = torch.arange(d_state, dtype=torch.float64)
    if init == "real":
        return -(n + 1), n[:0]
    half = n[: d_state // 2]
    if init == "lin":
        frequency = math.pi * half
    elif init == "inv":
        frequency = d_state / math.pi * (d_state / (2 * half + 1) - 1)
    else:
        frequency, _ = legs_modes(d_state)
    return torch.full_like(half, -0.5), frequency


def legs_modes(d_state: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of HiPPO-LegS once a rank-1 term p p^T has made it normal, float64.

        A + p p^T = -1/2 + S,    S v = i w v,    p = sqrt(n + 1/2),    n = 0 .. d_state - 1

    Eigenvectors are free in their phase; here v* p > 0, so that every machine finds the same ones.

    Returns:
        w > 0 (d_state / 2,), ascending, and the v as columns (d_state, d_state / 2), complex.
    """
    p = (torch.arange(d_state, dtype=torch.float64) + 0.5).sqrt()
    skew = torch.triu(p[:, None] * p, 1) - torch.tril(p[:, None] * p, -1)
    w, v = torch.linalg.eigh(-1j * skew)
    w, v = w[d_state // 2 :], v[:, d_state // 2 :]
    return w, v * (p.to(v.dtype) @ v).sgn().conj()


def expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 without cancellation near 0, for real and complex z."""
    if not z.is_complex():
        return torch.expm1(z)
    x, y = z.real, z.imag
    real = torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square()
    return torch.complex(real, x.exp() * y.sin())


def discretize(A: Tensor, dt: Tensor, method: Discretization) -> tuple[Tensor, Tensor]:
    """Abar and Bbar of a step of length dt (d, 1), with the input held or averaged.

        zoh       Abar = exp(dt A),                      Bbar = (Abar - 1) / A
        bilinear  Abar = (1 + dt A / 2) / (1 - dt A / 2),  Bbar = dt / (1 - dt A / 2)

    Source: arXiv:2206.11893, section 3.1.
    """
    if method == "zoh":
        change = expm1(dt * A)
        return 1 + change, change / A
    ahead = 1 / (1 - dt * A / 2)
    return (1 + dt * A / 2) * ahead, dt * ahead


@in_full_precision
def s4d_system(
    log_dt: Tensor,
    log_A_real: Tensor,
    A_imag: Tensor | None,
    C: Tensor,
    method: Discretization,
) -> tuple[Tensor, Tensor, Tensor]:
    """Abar, Bbar and C (d, n) of a layer's parameters, in at least float32.

    Args:
        log_dt: (d,) log of the steps.
        log_A_real: (d, n) log of -Re A.
        A_imag: (d, n) Im A, of which each stands for a conjugate pair; None for real states.
        C: (d, n, 2) real and imaginary parts, (d, n) for real states; pairs come out doubled.
        method: as in `discretize`.
    """
    A = -log_A_real.exp()
    if A_imag is not None:
        A, C = torch.complex(A, A_imag), 2 * torch.view_as_complex(C)
    return *discretize(A, log_dt.exp()[:, None], method), C


@in_full_precision
def s4d_scan_ref(
    u: Tensor,
    Abar: Tensor,
    Bbar: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the oscillators one token at a time.

        h[t] = Abar h[t-1] + Bbar u[t],    y[t] = Re sum_n C_n h_n[t],    h[-1] = h0

    This loop is the definition; `s4d_scan` must agree with it. O(t) steps.

    Args:
        u: (b, t, d) real inputs.
        Abar, Bbar, C: (d, n), all real or all complex, in u's precision.
        h0: (b, d, n) state carried in; None means zeros.
        starts: (b, t) bool, True where the state is zeroed before the token; None means nowhere.

    Returns:
        y (b, t, d) real, and the last state (b, d, n).
    """
    h = Abar.new_zeros(u.shape[0], *Abar.shape) if h0 is None else h0
    ys = []
    for i in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, i, None, None], 0, h)
        y, h = s4d_step(u[:, i], h, Abar, Bbar, C)
        ys.append(y)
    return torch.stack(ys, dim=1), h


@in_full_precision
def s4d_scan(
    u: Tensor,
    Abar: Tensor,
    Bbar: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`s4d_scan_ref` as a convolution: O(t log t) for the outputs, O(t n) for the last state.

    The response of a channel to one impulse is its kernel; what h0 still says is a response too.
    Every document is convolved by itself, so nothing leaks from one to the next.
    """
    table = power_table(Abar, u.shape[1])
    origin = Bbar[None] if h0 is None else torch.cat([Bbar[None], Abar * h0])
    response = free_response(origin, C, table)
    kernel, echo = response[0], response[1:].transpose(1, 2)
    y = convolve(u, kernel, None if h0 is None else echo, starts)
    return y, last_state(*last_document(u, h0, starts), Abar, Bbar, table)


def convolve(u: Tensor, kernel: Tensor, echo: Tensor | None, starts: Tensor | None) -> Tensor:
    """Convolve every document with the kernel (d, t); add echo (b, t, d) to what continues."""
    if starts is None:
        y = fft_convolve(u, kernel)
        return y if echo is None else y + echo
    y = convolve_documents(u, kernel, starts)
    carried = starts.cumsum(dim=1) == 0
    return y if echo is None else y + torch.where(carried[:, :, None], echo, 0)


def last_document(
    u: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """u and h0 with zeros wherever the last document of a row cannot see them."""
    if starts is None:
        return u, h0
    document = starts.cumsum(dim=1)
    if h0 is not None:
        h0 = torch.where(document[:, -1, None, None] == 0, h0, 0)
    return torch.where((document == document[:, -1:])[:, :, None], u, 0), h0


class PowerTable(NamedTuple):
    """Powers of Abar in two digits: Abar ** (c i + k) = coarse[:, i] * fine[:, k].

    fine (d, c, n); coarse (d, j, n); length t.
    """

    fine: Tensor
    coarse: Tensor
    length: int


def block_lengths(t: int) -> tuple[int, int]:
    """c and j: tokens in a block, and blocks that hold t tokens."""
    c = 1 << ((t.bit_length() + 1) // 2)
    return c, -(-t // c)


def power_table(Abar: Tensor, t: int) -> PowerTable:
    """All powers below t with O(sqrt(t)) entries per state, by repeated squaring.

    Products of Abar, not exponentials of multiples: the rounding is then that of the recurrence.
    """
    c, j = block_lengths(t)
    fine, stride = powers(Abar, c)
    coarse, _ = powers(stride, j)
    return PowerTable(fine, coarse, t)


def powers(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """a ** 0 .. a ** (count - 1) as (d, count, n), and a ** (the next power of two)."""
    table = torch.ones_like(a)[:, None]
    while table.shape[1] < count:
        table = torch.cat([table, table * a[:, None]], dim=1)
        a = a * a
    return table[:, :count], a


def free_response(h: Tensor, C: Tensor, table: PowerTable) -> Tensor:
    """What undisturbed states say in the next t tokens: Re sum_n C_n Abar_n ** k h_n, k < t.

    Args:
        h: (b, d, n) the state after the first of these tokens.

    Returns:
        (b, d, t).
    """
    fine, coarse, t = table
    ahead = (C * h)[:, :, None] * coarse  # (b, d, j, n): the state at every block's first token
    blocks = real_rows(ahead.conj().transpose(0, 1).flatten(1, 2)) @ real_rows(fine).mT
    return blocks.unflatten(1, (h.shape[0], -1)).flatten(2)[..., :t].transpose(0, 1)


def last_state(
    u: Tensor, h0: Tensor | None, Abar: Tensor, Bbar: Tensor, table: PowerTable
) -> Tensor:
    """h[t-1] = sum_s Abar ** (t-1-s) Bbar u[s] + Abar ** t h0, block by block: (b, d, n)."""
    fine, coarse, t = table
    j, c = coarse.shape[1], fine.shape[1]
    blocks = F.pad(u.permute(2, 0, 1), (j * c - t, 0)).unflatten(2, (j, c))  # (d, b, j, c)
    sums = blocks.flatten(1, 2) @ real_rows(fine.flip(1))
    if Abar.is_complex():
        sums = torch.view_as_complex(sums.unflatten(2, (-1, 2)))
    h = (sums.unflatten(1, (-1, j)) * coarse.flip(1)[:, None]).sum(2)
    h = h.transpose(0, 1).contiguous() * Bbar
    if h0 is None:
        return h
    return h + Abar * fine[:, (t - 1) % c] * coarse[:, -1] * h0


def real_rows(z: Tensor) -> Tensor:
    """(..., n) as real (..., 2 n), re and im in turn: conj(x) . y there is Re(x y) here."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2) if z.is_complex() else z


def fft_convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """y[t] = sum_s kernel[:, t - s] u[s], for u (b, t, d) and a kernel (d, >= t)."""
    t = u.shape[1]
    n = 1 << (2 * t - 1).bit_length()  # no wrap-around, and a length that every FFT likes
    spectrum = torch.fft.rfft(u.transpose(1, 2), n) * torch.fft.rfft(kernel[:, :t], n)
    return torch.fft.irfft(spectrum, n)[..., :t].transpose(1, 2)


def convolve_documents(u: Tensor, kernel: Tensor, starts: Tensor) -> Tensor:
    """`fft_convolve` of every document by itself; a row begins one even without a start.

    Documents become rows of zero-padded batches, one batch per power of two of their length, so
    that a few long ones do not stretch many short ones.
    """
    b, t = starts.shape
    tokens = u.flatten(0, 1)
    begins = starts | (torch.arange(t, device=u.device) == 0)
    begin = begins.flatten().nonzero()[:, 0]
    length = torch.diff(begin, append=begin.new_tensor([b * t]))
    size = torch.frexp((length - 1).double()).exponent  # length <= 2 ** size
    places, outputs = [], []
    for bits in size.unique().tolist():
        chosen = size == bits
        offset = torch.arange(min(1 << bits, t), device=u.device)
        inside = offset < length[chosen, None]
        place = begin[chosen, None] + offset
        rows = torch.where(inside[..., None], tokens[place.clamp(max=b * t - 1)], 0)
        places.append(place[inside])
        outputs.append(fft_convolve(rows, kernel)[inside])
    order = torch.cat(places).argsort()
    return torch.cat(outputs)[order].unflatten(0, (b, t))


@in_full_precision
def s4d_step(u: Tensor, h: Tensor, Abar: Tensor, Bbar: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `s4d_scan_ref`: u and y (b, d), h (b, d, n)."""
    h = Abar * h + Bbar * u[:, :, None]
    return (C * h).sum(-1).real, h


S4D_SCAN = Engines(
    "s4d_scan",
    reference=s4d_scan_ref,
    torch=s4d_scan,
    native="kizzasi.models.ops.native.oscillators:s4d_scan",
)
