"""S5: the scan against its loop, the start against dense HiPPO-N, the layer against the paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.s5 import S5Spec
from kizzasi.models.ops.s5 import diagonal_scan, diagonal_scan_ref

LENGTHS = (1, 2, 7, 15, 16, 17, 63, 64, 65, 100, 300)


def close(actual, expected):
    if actual.is_complex():
        actual, expected = (torch.view_as_real(x.resolve_conj()) for x in (actual, expected))
    assert_close(actual, expected)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(spec, d_model=6, dtype=torch.float64):
    mixer = spec.build(LayerContext(d_model))
    mixer.to(dtype).reset_parameters(2, torch.Generator().manual_seed(0))
    return mixer


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", ["zero state", "carried", "carried, documents", "documents"])
@pytest.mark.parametrize("decay", [(0.5, 0.999), (0.0, 1e-6), (1 - 1e-7, 1.0)])
def test_scan_equals_reference(length, case, decay):
    generator = torch.Generator().manual_seed(3)
    size = torch.empty(4, dtype=torch.float64).uniform_(*decay, generator=generator)
    starts = None
    if "documents" in case:
        starts = torch.rand(2, length, generator=generator) < 0.1
        starts[0, 0] = True
    results = []
    for scan in (diagonal_scan, diagonal_scan_ref):
        v = draw(2, length, 4, dtype=torch.complex128).requires_grad_()
        inputs = [v, torch.polar(size, draw(4)).requires_grad_()]
        if "carried" in case:
            inputs.append(draw(2, 4, seed=4, dtype=torch.complex128).requires_grad_())
        h = scan(*inputs, starts=starts)
        loss = (h.real * torch.linspace(-1, 1, h.numel()).view_as(h)).sum()
        loss = loss + h[:, -1].abs().square().sum()
        results.append((h, *torch.autograd.grad(loss, inputs)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_documents_cannot_leak():
    v, starts = draw(2, 90, 3, dtype=torch.complex128), torch.zeros(2, 90, dtype=torch.bool)
    starts[0, [5, 6, 70]] = starts[1, 17] = True
    v[0, 6:70] = math.nan
    h = diagonal_scan(v, torch.full((3,), 0.9 + 0.1j, dtype=torch.complex128), starts=starts)
    assert h[0, 6:70].isnan().all()
    assert h[0, :6].isfinite().all()
    assert h[0, 70:].isfinite().all()
    assert h[1].isfinite().all()


@pytest.mark.parametrize(("d_state", "n_blocks"), [(6, 1), (8, 2)])
@torch.no_grad()
def test_starts_as_a_real_system_of_hippo_blocks(d_state, n_blocks):
    """The layer, run by matrix exponentials of the dense blocks with maps from the eigenbasis."""
    spec = S5Spec(d_state=d_state, n_blocks=n_blocks, dt_min=0.05, dt_max=0.05)
    mixer, x = build(spec), draw(1, 9, 6)
    size = d_state // n_blocks
    p = (torch.arange(size).double() + 0.5).sqrt()
    below = torch.tril(2 * p[:, None] * p, -1)
    legs = -below - torch.diag(torch.arange(size).double() + 1)
    block = legs + p[:, None] * p
    assert_close(block + block.mT, -torch.eye(size).double())
    A = torch.block_diag(*[block] * n_blocks)

    w, V = torch.linalg.eigh(-1j * (block - block.mT) / 2)
    V = V[:, size // 2 :]
    V = V * ((p + 0j) @ V).sgn().conj()
    assert_close(mixer.A_imag.data, w[size // 2 :].repeat(n_blocks))
    V = torch.block_diag(*[V] * n_blocks)
    B = 2 * (V @ torch.view_as_complex(mixer.B)).real
    C = 2 * (torch.view_as_complex(mixer.C) @ V.mH).real

    Abar = torch.matrix_exp(0.05 * A)
    Bbar = torch.linalg.solve(A, (Abar - torch.eye(d_state).double()) @ B)
    h = torch.zeros(d_state, dtype=torch.float64)
    out = mixer(x).y
    for t in range(9):
        h = Abar @ h + Bbar @ x[0, t]
        g = F.gelu(C @ h + mixer.D * x[0, t])
        assert_close(out[0, t], g * torch.sigmoid(mixer.out_proj(g)))


@torch.no_grad()
def test_maps_start_with_unit_gain():
    mixer = build(S5Spec(d_state=128), d_model=64)
    assert 0.9 < mixer.B.square().sum() / 64 < 1.1  # half of d_state rows of unit length
    assert 0.9 < mixer.C.square().sum() / 32 < 1.1
    dt = mixer.log_dt.exp()
    assert ((dt >= 1e-3) & (dt <= 1e-1)).all()
    assert mixer.log_dt.unique().numel() == 64  # every state has its own
    rules = mixer.param_rules
    assert rules.keys() == {"log_dt", "log_A_real", "A_imag", "B"}
    assert all(not rule.decay and rule.lr_max == 1e-3 for rule in rules.values())


@pytest.mark.parametrize("length", [1, 7, 1000])
@torch.no_grad()
def test_float32_stays_near_float64_at_full_size(length):
    x = draw(2, length, 6)
    high = build(S5Spec())
    low = build(S5Spec())
    low, y = low.float(), high(x)
    out = low(x.float())
    assert (out.y - y.y).abs().max() < 1e-5 * y.y.abs().max()
    assert (out.state.h - y.state.h).abs().max() < 1e-5 * y.state.h.abs().max()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (S5Spec(d_state=0), r"m.d_state: 0 is not positive"),
        (S5Spec(n_blocks=0), r"m.n_blocks: 0 is not positive"),
        (S5Spec(d_state=12), r"m.d_state: 12 is not n_blocks 4 times an even number; give 16"),
        (S5Spec(dt_min=0.5), r"m.dt_max: 0.1 is less than dt_min 0.5; exchange them"),
    ],
)
def test_check_names_the_rule_and_the_remedy(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(16, "m")
    S5Spec(d_state=4, n_blocks=2).check(16, "m")
