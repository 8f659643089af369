"""Diagonal-plus-low-rank state spaces, one per channel: the systems of S4.

    x'(t) = A x(t) + B u(t),    y(t) = C x(t),    A = V (Lambda - P P*) V*       (section 3.1)

    h = V* x    (b, d, n) state; u and y (b, t, d)
    N = 2 n     order of A. Eigenvalues come in conjugate pairs, of which the upper one is kept
    <x, y>      sum over both of each pair: 2 Re sum_n x_n y_n; <P*, h> is what P P* sees of h
    z           e^{-i theta}, a t-th root of -1; s = sin(theta / 2), k = cos(theta / 2)
    f           (t + 1) // 2 roots, the upper half of the circle: theta = pi / t, 3 pi / t, ..

With the step taken into the system, A := A dt / 2 and B := B dt / 2, the bilinear rule reads
(section 2.3, appendix C.2)

    Abar = (1 - A)^-1 (1 + A),    Bbar = 2 (1 - A)^-1 B

and the generating function of the kernel, with e^{i theta / 2} = k + i s taken out, has no pole at
z = -1:

    sum_{j < t} C Abar^j Bbar z^j = (k + i s) C~ (i s - k A)^-1 B,    C~ = C (1 + Abar^t)

Roots of -1, where the paper takes roots of 1: the differences 1 - Abar^t and 1 - z, which vanish
for slow memories, become sums, and float32 keeps its digits. They are every other root of 1 of
order 2 t.

Lambda - P P* is dissipative as long as Re Lambda < 0, so that |Abar| <= 1 whatever is learnt.

Source: Gu, Goel & Re 2022, arXiv:2111.00396; P P*, not P Q*: Goel et al. 2022, arXiv:2202.09729.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.s4 import convolve, last_document, legs_modes, real_rows

S4Init = Literal["legs", "fourier", "lin"]


def dplr_start(init: S4Init, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lambda, P and B at the start, of each conjugate pair the upper one.

        legs     HiPPO-LegS, which remembers all of the past, scaled: Lambda = -1/2 + i w
        fourier  HiPPO-FouT, which remembers a window of length 1: Lambda = 2 pi i n, P = sqrt(2)
        lin      -1/2 + i pi n, B = 1; P = 0 says that there is none to prescribe

    For legs and fourier B = sqrt(2) P.

    Returns:
        (d_state / 2,) each, complex128, float64 and float64.

    Source: arXiv:2111.00396, theorem 1 and appendix C.1; FouT: Gu et al. 2022, arXiv:2206.12037,
        section 4; lin: arXiv:2206.11893, section 4.
    """
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":
        return torch.complex(torch.full_like(n, -0.5), math.pi * n), 0 * n, torch.ones_like(n)
    if init == "fourier":
        P = (1 + n.clamp(max=1)).sqrt()  # 1 for the constant, which has no sine beside it
        return torch.complex(0 * n, 2 * math.pi * n), P, math.sqrt(2) * P
    w, V = legs_modes(d_state)
    p = (torch.arange(d_state, dtype=torch.float64) + 0.5).sqrt()
    P = (p.to(V.dtype) @ V).real
    return torch.complex(torch.full_like(w, -0.5), w), P, math.sqrt(2) * P


class DPLR(NamedTuple):
    """A system with its step taken in, all (d, n) complex.

    A = Lambda dt / 2;  P times sqrt(dt / 2);  B dt / 2;  C.
    """

    A: Tensor
    P: Tensor
    B: Tensor
    C: Tensor


def dplr_system(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> DPLR:
    """Take the steps dt (d, 1) into the system Lambda, P, B, C, all (d, n) complex."""
    half = dt / 2
    return DPLR(half * Lambda, half.sqrt() * P, half * B, C)


def dense_system(system: DPLR) -> tuple[Tensor, Tensor, Tensor]:
    """Abar (d, N, N), Bbar (d, N) and C (d, N) on real coordinates, re and im in turn."""
    basis = _basis(system)
    A = real_rows(_flow(system, basis)).permute(1, 2, 0)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Abar = torch.linalg.solve(eye - A, eye + A)
    Bbar = 2 * torch.linalg.solve(eye - A, real_rows(system.B))
    return Abar, Bbar, 2 * real_rows(system.C.conj())


@in_full_precision
def s4_system(
    log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, P: Tensor, B: Tensor, C: Tensor
) -> DPLR:
    """The system of a layer's parameters, in at least float32.

    Args:
        log_dt: (d,) log of the steps.
        log_A_real, A_imag: (d, n) log of -Re Lambda, and Im Lambda.
        P, B, C: (d, n, 2) real and imaginary parts.
    """
    Lambda = torch.complex(-log_A_real.exp(), A_imag)
    P, B, C = (torch.view_as_complex(x) for x in (P, B, C))
    return dplr_system(Lambda, P, B, C, log_dt.exp()[:, None])


@in_full_precision
def s4_scan_ref(
    u: Tensor, system: DPLR, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the systems one token at a time, with dense matrices.

        h[t] = Abar h[t-1] + Bbar u[t],    y[t] = <C, h[t]>,    h[-1] = h0

    This loop is the definition; `s4_scan` must agree with it. O(t N^2).

    Args:
        u: (b, t, d) real inputs, in the system's precision.
        h0: (b, d, n) complex state carried in; None means zeros.
        starts: (b, t) bool, True where the state is zeroed before the token; None means nowhere.

    Returns:
        y (b, t, d) real, and the last state (b, d, n).
    """
    Abar, Bbar, C = dense_system(system)
    h = u.new_zeros(u.shape[0], *C.shape) if h0 is None else real_rows(h0)
    ys = []
    for i in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, i, None, None], 0, h)
        h = (Abar @ h[..., None])[..., 0] + Bbar * u[:, i, :, None]
        ys.append((C * h).sum(-1))
    return torch.stack(ys, dim=1), _complex_rows(h)


@in_full_precision
def s4_scan(
    u: Tensor, system: DPLR, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`s4_scan_ref` as a convolution: O(t (N + log t) + N^3 log t) per channel.

    The kernel and what h0 still says are one function of what they start from; every document is
    convolved by itself, so nothing leaks from one to the next.

    Differs: the authors learn C~ of one training length; here C is learnt and C~ computed, so that
        every length belongs to the same system.
    """
    t = u.shape[1]
    power, roots = _power(system, t), _roots(system, t)
    origins = system.B[None]
    if h0 is not None:  # (1 - A) Abar h0 / 2, in B's place
        origins = torch.cat([origins, (h0 + _flow(system, h0)) / 2])
    responses, feedback = _responses(origins, system, power, roots)
    echo = None if h0 is None else responses[:, 1:].permute(1, 2, 0)
    y = convolve(u, responses[:, 0], echo, starts)
    u, h0 = last_document(u, h0, starts)
    # An input followed by its negative, for ever, leads from -settled to settled; what any other
    # start differs from that fades.
    settled = real_rows(_settled_state(u, system, feedback, roots))
    start = settled if h0 is None else settled + real_rows(h0.transpose(0, 1))
    return y, _complex_rows((settled + start @ power).transpose(0, 1))


@in_full_precision
def s4_step(u: Tensor, h: Tensor, system: DPLR) -> tuple[Tensor, Tensor]:
    """One token of `s4_scan_ref` in O(N): u and y (b, d), h (b, d, n).

    Abar h + Bbar u = h + 2 (1 - A)^-1 (A h + B u)
    """
    h = h + 2 * _solve(system, _flow(system, h) + system.B * u[:, :, None])
    return _pair(system.C, h)[..., 0], h


def _power(system: DPLR, t: int) -> Tensor:
    """Abar^t as (d, N, N) acting on rows of real coordinates, by repeated squaring."""
    basis = _basis(system)
    square = real_rows(basis + 2 * _solve(system, _flow(system, basis))).transpose(0, 1)
    power = None
    while True:
        if t & 1:
            power = square if power is None else power @ square
        t >>= 1
        if t == 0:
            assert power is not None
            return power
        square = square @ square


def s4_flops(batch: int, t: int, d: int, N: int) -> int:
    """Flops of the matrix products in `s4_scan` from the zero state."""
    squarings = t.bit_length() + t.bit_count() - 2
    sums = (16 + 8 * batch) * ((t + 1) // 2) * N  # the kernel's four, and two for every row's state
    return d * (2 * squarings * N**3 + 2 * (1 + batch) * N * N + sums)


class _Roots(NamedTuple):
    """s, k (f,) of the roots of -1; W = 1 / ((i s - k Lambda) (i s - k conj(Lambda))) as real rows
    (d, n, 2 f); length t."""

    s: Tensor
    k: Tensor
    W: Tensor
    length: int


def _roots(system: DPLR, t: int) -> _Roots:
    A = system.A
    odd = torch.arange(1, t + 1, 2, dtype=torch.float64, device=A.device)
    half_angle = odd * (math.pi / (2 * t))
    s, k = half_angle.sin().to(A.real.dtype), half_angle.cos().to(A.real.dtype)
    size, loss = A.real.square() + A.imag.square(), A.real
    product = torch.complex(size[..., None] * k.square() - s.square(), -2 * loss[..., None] * s * k)
    return _Roots(s, k, real_rows(product.reciprocal()), t)


def _responses(
    origins: Tensor, system: DPLR, power: Tensor, roots: _Roots
) -> tuple[Tensor, Tensor]:
    """Kernels of the system with each of the origins (m, d, n) in place of B.

        (i s - k A)^-1 v = Q v - Q P phi,    phi = k <P*, Q v> / (1 + k <P*, Q P>),
        Q = (i s - k Lambda)^-1                                    (Woodbury, appendix C.3)

    Returns:
        (d, m, t), and phi of the first origin (d, f).
    """
    s, k, _, t = roots
    C = real_rows(system.C.conj())
    readout = _complex_rows(C + (power @ C[..., None])[..., 0]).conj()
    left = torch.stack([readout, system.P.conj()], 1)
    right = torch.cat([origins, system.P[None]]).transpose(0, 1)
    sums = _cauchy(left[:, :, None] * right[:, None], system, roots)  # (d, 2, m + 1, f)
    seen, fed = sums[:, 0], sums[:, 1]
    phi = k * fed[:, :-1] / (1 + k * fed[:, -1:])
    spectrum = torch.complex(k, s) * (seen[:, :-1] - seen[:, -1:] * phi)
    every_other = torch.stack([torch.zeros_like(spectrum), spectrum], -1).flatten(-2)
    return 2 * torch.fft.irfft(every_other, 2 * t)[..., :t], phi[:, 0]


def _cauchy(a: Tensor, system: DPLR, roots: _Roots) -> Tensor:
    """Sums over poles, both of each pair: a (d, i, j, n) -> sum_n a_n Q_n + conj, (d, i, j, f).

    Over the common denominator the numerator is 2 (i s Re a - k Re(a conj(Lambda))).
    """
    s, k, W, _ = roots
    over = torch.stack([a.real, (a * system.A.conj()[:, None, None]).real], 1)
    sums = (over.flatten(1, 3) @ W).unflatten(1, over.shape[1:4])
    sums = torch.view_as_complex(sums.unflatten(-1, (-1, 2)))
    return 2 * (1j * s * sums[:, 0] - k * sums[:, 1])


def _settled_state(u: Tensor, system: DPLR, phi: Tensor, roots: _Roots) -> Tensor:
    """The state at the end of u after .. u, -u, u, -u and u again: (d, b, n).

    -1 / t sum_z z (1 - z Abar)^-1 Bbar u^(z),    z (k + i s) = k - i s
    """
    s, k, W, t = roots
    both = torch.full_like(s, -2 / t)  # the lower half of the circle mirrors the upper
    if t % 2:
        both[-1] = -1 / t  # -1 is its own mirror image
    drive = torch.complex(k, -s) * both * torch.fft.rfft(u.permute(2, 0, 1), 2 * t)[..., 1::2]
    drive = torch.stack([drive, drive * phi[:, None]], 1)  # through B, through P
    over = torch.stack([1j * s * drive, k * drive], 1)
    sums = (real_rows(over.conj()).flatten(1, 3) @ W.mT).unflatten(1, over.shape[1:4])
    states = sums[:, 0] - system.A.conj()[:, None, None] * sums[:, 1]
    return system.B[:, None] * states[:, 0] - system.P[:, None] * states[:, 1]


def _pair(x: Tensor, y: Tensor) -> Tensor:
    """<x, y>, with a last dimension of 1."""
    return 2 * (x * y).sum(-1, keepdim=True).real


def _flow(system: DPLR, h: Tensor) -> Tensor:
    """A h for (..., d, n)."""
    return system.A * h - system.P * _pair(system.P.conj(), h)


def _solve(system: DPLR, v: Tensor) -> Tensor:
    """(1 - A)^-1 v for (..., d, n), by Woodbury's identity."""
    Q = 1 / (1 - system.A)
    v, QP = Q * v, Q * system.P
    seen = _pair(system.P.conj(), v) / (1 + _pair(system.P.conj(), QP))
    return v - QP * seen


def _basis(system: DPLR) -> Tensor:
    """The N states with one real coordinate 1: (N, 1, n)."""
    N = 2 * system.A.shape[-1]
    eye = torch.eye(N, dtype=system.A.real.dtype, device=system.A.device)
    return _complex_rows(eye)[:, None]


def _complex_rows(x: Tensor) -> Tensor:
    """(..., 2 n) real to (..., n): undoes `real_rows`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


S4_SCAN = Engines(
    "s4_scan",
    reference=s4_scan_ref,
    torch=s4_scan,
    native="kizzasi.models.ops.native.oscillators:s4_scan",
)
