"""S4D: convolution against recurrence, initial poles against their definition, numerics."""

import math

import numpy as np
import pytest
import torch
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models.call import Call
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.s4d import S4DSpec
from kizzasi.models.ops.s4 import (
    discretize,
    fft_convolve,
    free_response,
    power_table,
    s4d_poles,
    s4d_scan,
    s4d_scan_ref,
)

LENGTHS = (1, 2, 7, 63, 64, 65, 100)
D_MODEL = 6
SPECS = {
    **{kind: S4DSpec(d_state=8, init=kind) for kind in ("lin", "inv", "legs", "real")},
    "bilinear": S4DSpec(d_state=4, discretization="bilinear"),
    "slow": S4DSpec(d_state=4, dt_min=1e-6, dt_max=1e-5),
    "fast": S4DSpec(d_state=4, dt_min=5.0, dt_max=9.0),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
kinds = pytest.mark.parametrize("dtype", [torch.complex128, torch.float64], ids=["complex", "real"])


def close(actual, expected, msg=""):
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert_close(actual, expected, msg=msg)


def system(dtype, d=3, n=4, decay=(0.5, 0.999)):
    """Abar, Bbar, C with |Abar| in the given range."""
    generator = torch.Generator().manual_seed(0)
    size = torch.empty(d, n, dtype=torch.float64).uniform_(*decay, generator=generator)
    if dtype.is_complex:
        angle = torch.randn(d, n, generator=generator, dtype=torch.float64)
        Abar = torch.polar(size, angle)
    else:
        Abar = size
    Bbar, C = torch.randn(2, d, n, generator=generator, dtype=dtype)
    return [x.clone().requires_grad_() for x in (Abar, Bbar, C)]


def signal(b, t, d=D_MODEL, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, d, generator=generator, dtype=dtype)


def build(spec, dtype=torch.float64, engine="torch"):
    mixer = spec.build(LayerContext(D_MODEL, n_layers=2))
    mixer.reset_parameters(2, torch.Generator().manual_seed(0))
    mixer.engine = engine
    return mixer.to(dtype)


def fold(mixer, x, state=None):
    state = mixer.init_state(x.shape[0], x.device, x.dtype) if state is None else state
    ys = []
    for i in range(x.shape[1]):
        out = mixer.step(x[:, i], state)
        ys.append(out.y)
        state = out.state
    return torch.stack(ys, 1), state


def test_lin_inv_and_real_follow_their_formulas():
    real, imag = s4d_poles("lin", 6)
    assert_close(real, torch.full((3,), -0.5, dtype=torch.float64))
    assert_close(imag, torch.tensor([0.0, math.pi, 2 * math.pi], dtype=torch.float64))
    inv = [8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]
    assert_close(s4d_poles("inv", 8)[1], torch.tensor(inv, dtype=torch.float64))
    real, imag = s4d_poles("real", 3)
    assert real.tolist() == [-1, -2, -3]
    assert imag.numel() == 0


@pytest.mark.parametrize("n", [2, 8, 64])
def test_legs_are_the_eigenvalues_of_the_normal_part(n):
    k = np.arange(n)
    legs = -np.tril(np.sqrt(np.outer(2 * k + 1, 2 * k + 1)), -1) - np.diag(k + 1.0)
    p = np.sqrt(k + 0.5)
    eigenvalues = np.linalg.eigvals(legs + np.outer(p, p))
    upper = eigenvalues[eigenvalues.imag > 0]
    upper = upper[np.argsort(upper.imag)]
    real, imag = s4d_poles("legs", n)
    assert_close(real, torch.from_numpy(np.ascontiguousarray(upper.real)))
    assert_close(imag, torch.from_numpy(np.ascontiguousarray(upper.imag)))


def test_zoh_is_the_exact_solution_for_a_held_input():
    A, dt = torch.complex(torch.tensor(-0.7), torch.tensor(2.0)).to(torch.complex128), 0.3
    generator = torch.tensor([[A, 1.0], [0, 0]]) * dt
    exact = torch.matrix_exp(generator)
    Abar, Bbar = discretize(A[None, None], torch.tensor([[dt]], dtype=torch.float64), "zoh")
    close(Abar[0, 0], exact[0, 0])
    close(Bbar[0, 0], exact[0, 1])


@pytest.mark.parametrize("A", [torch.tensor([[-0.5 + 3j]]), torch.tensor([[-0.5]])])
def test_small_steps_do_not_cancel_in_float32(A):
    dt = torch.tensor([[1e-6]])
    _, low = discretize(A, dt, "zoh")
    wide = A.to(torch.complex128 if A.is_complex() else torch.float64)
    _, high = discretize(wide, dt.double(), "zoh")
    assert ((low - high).abs() / high.abs()).item() < 1e-6


@kinds
@pytest.mark.parametrize("length", LENGTHS)
def test_kernel_is_the_vandermonde_product(dtype, length):
    Abar, Bbar, C = system(dtype)
    powers = Abar[..., None] ** torch.arange(length)
    expected = ((C * Bbar)[..., None] * powers).sum(1).real
    got = free_response(Bbar[None], C, power_table(Abar, length))[0]
    close(got, expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_convolution_is_causal_and_exact(length):
    u, kernel = signal(2, length, 3), signal(1, length, 3, seed=1)[0].T
    expected = torch.stack(
        [sum(kernel[:, i - s] * u[:, s] for s in range(i + 1)) for i in range(length)], 1
    )
    assert_close(fft_convolve(u, kernel), expected)


@kinds
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", ["zero state", "carried", "carried, documents", "documents"])
@pytest.mark.parametrize("decay", [(0.5, 0.999), (0.0, 1e-6), (1 - 1e-7, 1.0)])
def test_scan_equals_reference(dtype, length, case, decay):
    generator = torch.Generator().manual_seed(3)
    starts = None
    if "documents" in case:
        starts = torch.rand(2, length, generator=generator) < 0.15
        starts[0, 0] = True
    results = []
    for scan in (s4d_scan, s4d_scan_ref):
        inputs = [signal(2, length, 3).requires_grad_(), *system(dtype, decay=decay)]
        if "carried" in case:
            h0 = torch.randn(2, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(4))
            inputs.append(h0.requires_grad_())
        y, h = scan(*inputs, starts=starts)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + h.abs().square().sum()
        results.append((y, h, *torch.autograd.grad(loss, inputs)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@kinds
def test_documents_cannot_leak(dtype):
    u, starts = signal(2, 40, 3), torch.zeros(2, 40, dtype=torch.bool)
    starts[0, [5, 6, 30]] = starts[1, 17] = True
    u[0, 6:30] = math.nan
    y, h = s4d_scan(u, *system(dtype), starts=starts)
    assert y[0, 6:30].isnan().all()
    assert y[0, :6].isfinite().all()
    assert y[0, 30:].isfinite().all()
    assert y[1].isfinite().all()
    assert h.isfinite().all()


@every_spec
@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_forward_equals_fold_of_step(spec, length):
    mixer, x = build(spec), signal(2, length)
    out = mixer(x)
    ys, state = fold(mixer, x)
    assert_close(out.y, ys)
    close(out.state.h, state.h)


@every_spec
@pytest.mark.parametrize("length", [1, 2, 65])
def test_engines_agree_in_values_gradients_and_state(spec, length):
    results = []
    for engine in ("torch", "reference"):
        mixer, x = build(spec, engine=engine), signal(2, length).requires_grad_()
        h0 = mixer(signal(2, 9, seed=1)).state.h.detach().requires_grad_()
        out = mixer(x, type(mixer.init_state(1))(h0))
        loss = out.y.square().sum() + out.state.h.abs().square().sum()
        results.append((out.y, *torch.autograd.grad(loss, [x, h0, *mixer.parameters()])))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@every_spec
@pytest.mark.parametrize("splits", [(8, 8, 5), (1, 20), (20, 1)])
def test_splits_equal_one_call(spec, splits):
    mixer, x = build(spec), signal(2, 21)
    state, ys = None, []
    for piece in x.split(list(splits), dim=1):
        out = mixer(piece, state)
        state = out.state
        ys.append(out.y)
    whole = mixer(x)
    assert_close(torch.cat(ys, 1), whole.y)
    close(state.h, whole.state.h)


@every_spec
def test_documents_and_padding_leave_no_trace(spec):
    mixer = build(spec)
    documents = [signal(1, n, seed=n) for n in (6, 1, 11)]
    ids = torch.cat([torch.full((1, n), i) for i, n in ((0, 6), (1, 1), (5, 11))], 1)
    before = mixer(signal(1, 4, seed=2)).state
    out = mixer(torch.cat(documents, 1), before, call=Call.of(torch.cat(documents, 1), ids))
    alone = [mixer(documents[0], before), mixer(documents[1]), mixer(documents[2])]
    assert_close(out.y, torch.cat([a.y for a in alone], 1))
    close(out.state.h, alone[-1].state.h)
    padded = torch.cat([signal(1, 3), documents[0]], 1)
    out = mixer(padded, call=Call.of(padded, torch.tensor([[-1] * 3 + [0] * 6])))
    assert_close(out.y[:, 3:], mixer(documents[0]).y)


@every_spec
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64), (1, 100)])
def test_cost_is_what_is_measured(spec, batch, length):
    mixer = build(spec, torch.float32)
    cost = spec.cost(LayerContext(D_MODEL), length, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = mixer(signal(batch, length, dtype=torch.float32))
    assert cost.flops == counter.get_total_flops()
    assert cost.params == cost.active_params == sum(p.numel() for p in mixer.parameters())
    assert cost.state_bytes == out.state.h.nbytes


@every_spec
def test_low_precision_keeps_the_system_and_its_sums_in_float32(spec):
    full, x = build(spec, torch.float32), signal(2, 33, dtype=torch.float32)
    expected = full(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, stepped = full(x), fold(full, x)[0]
    assert torch.equal(mixed.state.h, expected.state.h)
    low = build(spec, torch.bfloat16)
    assert {getattr(low, name).dtype for name in ("log_dt", "log_A_real", "C", "D")} == {
        torch.float32
    }
    out = low(x.bfloat16())
    assert out.state.h.dtype == expected.state.h.dtype
    for y in (mixed.y, stepped, out.y, fold(low, x.bfloat16())[0]):
        assert y.dtype == torch.bfloat16
        assert (y.float() - expected.y).abs().mean() < 0.05 * expected.y.std()
    out.y.float().sum().backward()


def test_float32_recurrence_and_convolution_stay_together_over_a_thousand_tokens():
    mixer = build(S4DSpec(d_state=64, init="inv"), torch.float32)
    x = signal(1, 1000, dtype=torch.float32)
    with torch.no_grad():
        out, (ys, state) = mixer(x), fold(mixer, x)
    assert_close(out.y, ys)
    close(out.state.h, state.h)


def test_initialisation():
    mixer = build(S4DSpec(d_state=4), torch.float32)
    dt = mixer.log_dt.exp()
    assert ((dt >= 1e-3) & (dt <= 1e-1)).all()
    assert_close(-mixer.log_A_real.exp(), torch.full((D_MODEL, 2), -0.5))
    kernel_rules = {name: mixer.param_rules[name] for name in ("log_dt", "log_A_real", "A_imag")}
    assert all(not rule.decay and rule.lr_max == 1e-3 for rule in kernel_rules.values())
    assert build(SPECS["real"]).A_imag is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (S4DSpec(d_state=0), r"m.d_state: 0 is not positive"),
        (S4DSpec(d_state=3), r"m.d_state: 3 is odd and states come in pairs; give an even number"),
        (S4DSpec(dt_min=0.0), r"m.dt_min: 0.0 is not positive"),
        (S4DSpec(dt_min=0.5), r"m.dt_max: 0.1 is less than dt_min 0.5; exchange them"),
    ],
)
def test_check_names_the_rule_and_the_remedy(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(16, "m")
    S4DSpec(d_state=3, init="real").check(16, "m")
