"""S4: HiPPO matrices against their definitions, low-rank forms and kernels against dense ones."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.s4 import S4Spec
from kizzasi.models.ops.dplr import (
    dense_system,
    dplr_start,
    dplr_system,
    s4_scan,
    s4_scan_ref,
    s4_step,
)
from kizzasi.models.ops.s4 import legs_modes

LENGTHS = (1, 2, 7, 63, 64, 65, 100)
INITS = ("legs", "fourier", "lin")
D, N = 3, 8
every_length = pytest.mark.parametrize("length", LENGTHS)
every_init = pytest.mark.parametrize("init", INITS)


def close(actual, expected, msg=""):
    if actual.is_complex():
        actual, expected = (torch.view_as_real(x.resolve_conj()) for x in (actual, expected))
    assert_close(actual, expected, msg=msg)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaves(init, steps=(1e-3, 1e-1)):
    """Lambda, P, B, C and dt, away from where they start."""
    A, P, B = (x.expand(D, -1).to(torch.complex128) for x in dplr_start(init, N))
    P, B, C = (
        x + 0.1 * draw(D, N // 2, seed=i, dtype=torch.complex128)
        for i, x in enumerate((P, B, torch.zeros_like(B)))
    )
    dt = torch.tensor(steps, dtype=torch.float64).log()
    dt = torch.linspace(dt[0], dt[1], D, dtype=torch.float64).exp()[:, None]
    return [x.clone().requires_grad_() for x in (A - 1e-4, P, B, 10 * C, dt)]


def system(init, steps=(1e-3, 1e-1)):
    return dplr_system(*(x.detach() for x in leaves(init, steps)))


def legs_matrix(n):
    """-sqrt(2 n + 1) sqrt(2 k + 1) below the diagonal, -(n + 1) on it."""
    k = np.arange(n)
    return -np.tril(np.sqrt(np.outer(2 * k + 1, 2 * k + 1)), -1) - np.diag(k + 1.0)


def test_legs_projects_the_past_on_legendre_polynomials():
    """t c' = A c + B f(t) for c_n = mean of f g_n over [0, t], g_n orthonormal: by parts,
    A = -(1 + G) with (y + 1) g_n' = sum_k G_nk g_k, and B = g(1)."""
    size = np.sqrt(2 * np.arange(6) + 1)
    G = np.zeros((6, 6))
    for n in range(6):
        slope = legendre.legder(np.eye(6)[n] * size[n])
        row = legendre.legadd(legendre.legmulx(slope), slope)
        G[n, : len(row)] = row / size[: len(row)]
    np.testing.assert_allclose(-(np.eye(6) + G), legs_matrix(6), atol=1e-12)
    np.testing.assert_allclose(dplr_start("legs", 6)[2].square().sum() * 2, (size**2).sum())


@pytest.mark.parametrize("n", [2, 8, 64])
def test_legs_is_normal_plus_low_rank(n):
    half, P, B = dplr_start("legs", n)
    _, V = legs_modes(n)
    V, A, P, B = (torch.cat([x, x.conj()], -1) for x in (V, half, P + 0j, B + 0j))
    close(V.mH @ V, torch.eye(n, dtype=V.dtype))
    rebuilt = V @ (A.diag() - P[:, None] * P.conj()) @ V.mH
    close(rebuilt, torch.from_numpy(legs_matrix(n)) + 0j)
    close(V @ B, (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt() + 0j)


def fourier(n, dt):
    A, P, B = (x[None] + 0j for x in dplr_start("fourier", n))
    step = torch.tensor([[dt]], dtype=torch.float64)
    Abar, Bbar, _ = dense_system(dplr_system(A, P, B, B, step))
    return Abar[0], Bbar[0]


def test_fourier_matrix_follows_its_definition():
    """Derivatives of cosines (even coordinates) and sines, less what leaves the window."""
    eye = torch.eye(8, dtype=torch.float64)
    ends = torch.tensor([1, 0, *[math.sqrt(2), 0] * 3], dtype=torch.float64)
    turn = torch.tensor([0, 0, 0, 1, 0, 2, 0, 3], dtype=torch.float64)[1:] * 2 * math.pi
    A = torch.diag(turn, -1) - torch.diag(turn, 1) - 2 * ends[:, None] * ends
    Abar, Bbar = fourier(8, 0.1)
    assert_close(Abar, torch.linalg.solve(eye - 0.05 * A, eye + 0.05 * A))
    # h is V* x: x, and so its B = 2 ends, is sqrt(2) times the real coordinates of h
    assert_close(Bbar, torch.linalg.solve(eye - 0.05 * A, 0.1 * math.sqrt(2) * ends))


def test_fourier_remembers_an_impulse_for_one_unit_of_time():
    Abar, Bbar = fourier(64, 1e-3)
    early, late, gone = (
        (torch.linalg.matrix_power(Abar, k) @ Bbar).norm() for k in (100, 900, 1100)
    )
    assert late > 0.99 * early
    assert gone < 0.25 * early


def test_lin_has_no_low_rank_part_to_prescribe():
    A, P, B = dplr_start("lin", 6)
    close(A, torch.complex(torch.full((3,), -0.5).double(), math.pi * torch.arange(3.0).double()))
    assert not P.any()
    assert (B == 1).all()


@every_length
def test_kernel_is_that_of_the_dense_hippo_system(length):
    """LegS with its own basis, bilinear rule, powers: nothing of the low-rank form."""
    _, V = legs_modes(N)
    A, P, B = (x[None] + 0j for x in dplr_start("legs", N))
    C, dt = draw(N), torch.tensor([[0.05]], dtype=torch.float64)
    impulse = torch.zeros(1, length, 1, dtype=torch.float64)
    impulse[0, 0] = 1
    kernel, _ = s4_scan(impulse, dplr_system(A, P, B, (C + 0j) @ V[None], dt))
    dense = torch.from_numpy(legs_matrix(N))
    eye, input_map = torch.eye(N).double(), (2 * torch.arange(N).double() + 1).sqrt()
    Abar = torch.linalg.solve(eye - 0.025 * dense, eye + 0.025 * dense)
    h = torch.linalg.solve(eye - 0.025 * dense, 0.05 * input_map)
    for k in range(length):
        assert_close(kernel[0, k, 0], C @ h)
        h = Abar @ h


@every_init
@every_length
def test_kernel_equals_dense_powers(init, length):
    impulse = torch.zeros(1, length, D, dtype=torch.float64)
    impulse[0, 0] = 1
    kernel, last = s4_scan(impulse, system(init))
    Abar, Bbar, C = dense_system(system(init))
    powers = [torch.linalg.matrix_power(Abar, k) @ Bbar[..., None] for k in range(length)]
    assert_close(kernel[0], torch.stack([(C * h[..., 0]).sum(-1) for h in powers]))
    close(torch.view_as_real(last[0]).flatten(1), powers[-1][..., 0])


@every_init
@pytest.mark.parametrize("steps", [(1e-3, 1e-1), (1e-7, 1e-6), (2.0, 9.0)])
def test_step_equals_dense_matrices_and_never_grows_a_state(init, steps):
    here, u = system(init, steps), draw(2, D)
    h = draw(2, D, N // 2, seed=1, dtype=torch.complex128)
    Abar, Bbar, C = dense_system(here)
    rows = torch.view_as_real(h).flatten(-2)
    expected = (Abar @ rows[..., None])[..., 0] + Bbar * u[..., None]
    y, after = s4_step(u, h, here)
    close(torch.view_as_real(after).flatten(-2), expected)
    assert_close(y, (C * expected).sum(-1))
    assert (torch.linalg.matrix_norm(Abar, 2) <= 1 + 1e-12).all()


@every_length
@pytest.mark.parametrize("case", ["zero state", "carried", "carried, documents", "documents"])
@pytest.mark.parametrize("steps", [(1e-3, 1e-1), (1e-7, 1e-6), (2.0, 9.0)])
def test_scan_equals_reference(length, case, steps):
    init = INITS[length % 3]
    starts = None
    if "documents" in case:
        starts = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.15
        starts[0, 0] = True
    results = []
    for scan in (s4_scan, s4_scan_ref):
        inputs = [draw(2, length, D).requires_grad_(), *leaves(init, steps)]
        h0 = None
        if "carried" in case:
            h0 = draw(2, D, N // 2, seed=4, dtype=torch.complex128).requires_grad_()
        y, h = scan(inputs[0], dplr_system(*inputs[1:]), h0, starts)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + h.abs().square().sum()
        inputs += [] if h0 is None else [h0]
        results.append((y, h, *torch.autograd.grad(loss, inputs)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_documents_cannot_leak():
    u, starts = draw(2, 40, D), torch.zeros(2, 40, dtype=torch.bool)
    starts[0, [5, 6, 30]] = starts[1, 17] = True
    u[0, 6:30] = math.nan
    y, h = s4_scan(u, system("legs"), starts=starts)
    assert y[0, 6:30].isnan().all()
    assert y[0, :6].isfinite().all()
    assert y[0, 30:].isfinite().all()
    assert y[1].isfinite().all()
    assert h.isfinite().all()


def build(spec, dtype, d_model=6):
    mixer = spec.build(LayerContext(d_model))
    mixer.reset_parameters(2, torch.Generator().manual_seed(0))
    return mixer.to(dtype)


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    "spec", [*(S4Spec(init=kind) for kind in INITS), S4Spec(dt_min=1e-6, dt_max=1e-5)]
)
@torch.no_grad()
def test_float32_stays_near_float64_at_full_size(spec, length):
    x = draw(2, length, 6, dtype=torch.float32)
    low, high = build(spec, torch.float32)(x), build(spec, torch.float64)(x.double())
    assert (low.y - high.y).abs().max() < 3e-5 * high.y.abs().max()
    assert (low.state.h - high.state.h).abs().max() < 1e-4 * high.state.h.abs().max()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64), (1, 100)])
def test_cost_is_what_is_measured(batch, length):
    spec = S4Spec(d_state=6)
    mixer, cost = build(spec, torch.float32), spec.cost(LayerContext(6), length, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = mixer(draw(batch, length, 6, dtype=torch.float32))
    assert cost.flops == counter.get_total_flops()
    assert cost.params == cost.active_params == sum(p.numel() for p in mixer.parameters())
    assert cost.state_bytes == out.state.h.nbytes


def test_initialisation():
    mixer = build(S4Spec(init="lin"), torch.float32)
    assert ((mixer.log_dt.exp() >= 1e-3) & (mixer.log_dt.exp() <= 1e-1)).all()
    assert 0.9 < mixer.P.square().sum(-1).mean() < 1.1  # complex normal
    kernel = {"log_dt", "log_A_real", "A_imag", "P", "B"}
    assert kernel == mixer.param_rules.keys()
    assert all(not r.decay and r.lr_max == 1e-3 for r in mixer.param_rules.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (S4Spec(d_state=0), r"m.d_state: 0 is not positive"),
        (S4Spec(d_state=3), r"m.d_state: 3 is odd and states come in pairs; give an even number"),
        (S4Spec(dt_min=0.0), r"m.dt_min: 0.0 is not positive"),
        (S4Spec(dt_min=0.5), r"m.dt_max: 0.1 is less than dt_min 0.5; exchange them"),
    ],
)
def test_check_names_the_rule_and_the_remedy(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(16, "m")
