"""The Mamba-3 mixer: the complex state space it stands for, angles, activations, its spec's rules.

What every mixer must do (forward = fold of step, splits, packing, costs) is in the exam.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.mamba3 import Mamba3, Mamba3Spec
from kizzasi.models.ops import mimo
from kizzasi.models.ops.mamba3 import heavy_tail, rotate_pairs, summed_angles, turns
from kizzasi.models.ops.ssd import TrapezoidState


def make(spec, d_model=12, dtype=torch.float64, noise=0.3):
    mixer = spec.build(LayerContext(d_model, 1, 3))
    generator = torch.Generator().manual_seed(0)
    mixer.reset_parameters(3, generator)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator))
    return mixer.to(dtype)


def inputs(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def complex_state_space(m, x, activation):
    """y of (t, d) by a state of complex pairs that turns against the angles: no keys rotate.

    S[t] = a e^{-i speed} (S[t-1] + (1 - share) dt v[t-1] b[t-1]) + share dt v[t] b[t]
    y[t] = Re(conj(c[t]) S[t])
    """
    spec, h, p = m.spec, m.n_heads, m.spec.head_dim
    g, n, s = spec.n_groups, spec.d_state, spec.n_angles
    S, b_before, v_before, ys = 0.0, 0.0, 0.0, []
    for u in x:
        row = m.in_proj.weight @ u
        z, v, b, c, dt, rate, share, turn = row.split([h * p, h * p, g * n, g * n, h, h, h, s])
        dt, share = torch.log1p((dt + m.dt_bias).exp()), 1 / (1 + (-share).exp())
        decay = (-activation(rate).clamp(min=spec.A_floor) * dt).exp()
        speed = F.pad(math.pi * torch.tanh(turn), (0, n // 2 - s)) * dt[:, None]
        fade = torch.polar(decay[:, None].expand(h, n // 2), -speed)[:, None]
        keys = []
        for k, norm, bias in ((b, m.B_norm, m.B_bias), (c, m.C_norm, m.C_bias)):
            k = k.view(g, n)
            k = k / (k.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
            k = k.repeat_interleave(h // g, 0) + bias.squeeze(1)
            keys.append(torch.view_as_complex(k.view(h, n // 2, 2))[:, None])
        v = v.view(h, p, 1)
        left, right = ((1 - share) * dt)[:, None, None], (share * dt)[:, None, None]
        S = fade * (S + left * v_before * b_before) + right * v * keys[0]
        b_before, v_before = keys[0], v
        y = (keys[1].conj() * S).real.sum(-1) + m.D[:, None] * v[..., 0]
        ys.append(m.out_proj.weight @ (y.flatten() * z * torch.sigmoid(z)))
    return torch.stack(ys)


@pytest.mark.parametrize(
    "spec",
    [
        Mamba3Spec(d_state=8, head_dim=4),
        Mamba3Spec(d_state=6, head_dim=4, n_groups=3, rope_fraction=1.0),
        Mamba3Spec(d_state=4, head_dim=8, a_activation="heavy_tail"),
    ],
)
def test_it_is_a_complex_state_space(spec):
    activation = {"softplus": F.softplus, "heavy_tail": heavy_tail}[spec.a_activation]
    m, x, y = make(spec), inputs(70, 12).requires_grad_(), inputs(70, 12).requires_grad_()
    out, expected = m(x[None]).y[0], complex_state_space(m, y, activation)
    assert_close(out, expected)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    parameters = dict(m.named_parameters())
    ours = torch.autograd.grad((out * weights).sum(), [x, *parameters.values()])
    theirs = torch.autograd.grad((expected * weights).sum(), [y, *parameters.values()])
    for name, a, e in zip(["x", *parameters], ours, theirs, strict=True):
        assert_close(a, e, msg=name)


def mimo_loop(m, x):
    """y of (t, d) token by token, every sum over ranks written out."""
    spec, h, p, r = m.spec, m.n_heads, m.spec.head_dim, m.spec.rank
    g, n, s = spec.n_groups, spec.d_state, spec.n_angles
    S, angle, ys = torch.zeros(h, p, n, dtype=x.dtype), torch.zeros(h, s, dtype=x.dtype), []
    before = torch.zeros_like(S)
    for u in x:
        row = m.in_proj.weight @ u
        parts = row.split([h * p, h * p, r * g * n, r * g * n, h, h, h, s])
        z, v, dt, rate, share, turn = (parts[i] for i in (0, 1, 4, 5, 6, 7))
        dt, share = F.softplus(dt + m.dt_bias), share.sigmoid()
        decay = (-F.softplus(rate).clamp(min=spec.A_floor) * dt).exp()
        angle = angle + math.pi * torch.tanh(turn) * dt[:, None]
        turned = torch.polar(torch.ones_like(angle), angle)
        keys = []
        for k, norm, bias in ((parts[2], m.B_norm, m.B_bias), (parts[3], m.C_norm, m.C_bias)):
            k = k.view(r, g, n)
            k = k / (k.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
            k = k.repeat_interleave(h // g, 1).transpose(0, 1) + bias
            pairs = torch.complex(k[..., : n // 2], k[..., n // 2 :])
            pairs = torch.cat([pairs[..., :s] * turned[:, None], pairs[..., s:]], -1)
            keys.append(torch.cat([pairs.real, pairs.imag], -1))
        v, z, now = v.view(h, p), z.view(h, p), 0.0
        for i in range(r):
            now = now + (m.mimo_x[:, i] * v)[:, :, None] * keys[0][:, i, None]
        left, right = ((1 - share) * dt * decay)[:, None, None], (share * dt)[:, None, None]
        S, before = decay[:, None, None] * S + left * before + right * now, now
        y = 0.0
        for i in range(r):
            out = (S * keys[1][:, i, None]).sum(-1) + m.D[:, None] * m.mimo_x[:, i] * v
            if m.norm is not None:
                out = out / (out.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
                out = out * m.norm.weight.view(h, p)
            y = y + m.mimo_o[:, i] * out * F.silu(m.mimo_z[:, i] * z)
        ys.append(m.out_proj.weight @ y.flatten())
    return torch.stack(ys)


@pytest.mark.parametrize(
    "spec",
    [
        Mamba3Spec(d_state=8, head_dim=4, rank=2),
        Mamba3Spec(d_state=6, head_dim=4, n_groups=3, rope_fraction=1.0, rank=4, out_norm=True),
    ],
)
def test_several_inputs_and_outputs_are_their_sums(spec):
    m, x, y = make(spec), inputs(40, 12).requires_grad_(), inputs(40, 12).requires_grad_()
    out, expected = m(x[None]).y[0], mimo_loop(m, y)
    assert_close(out, expected)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    parameters = dict(m.named_parameters())
    ours = torch.autograd.grad((out * weights).sum(), [x, *parameters.values()])
    theirs = torch.autograd.grad((expected * weights).sum(), [y, *parameters.values()])
    for name, a, e in zip(["x", *parameters], ours, theirs, strict=True):
        assert_close(a, e, msg=name)


@pytest.mark.parametrize("share", [None, 0.2])
@pytest.mark.parametrize("length", [1, 2, 21, 22, 65])
def test_mimo_in_chunks_is_the_loop(length, share):
    b, h, r, p, n = 2, 2, 3, 4, 5
    x, B, C = inputs(b, length, h, r, p), inputs(b, length, h, r, n), inputs(b, length, h, r, n)
    dt, share_ = inputs(b, length, h).exp(), inputs(b, length, h, seed=2).sigmoid()
    given = [x, dt, -inputs(b, length, h, seed=3).exp(), share_, B, C]
    given += [inputs(b, h, p, n), inputs(b, h, r, n, seed=5), inputs(b, h, r, p, seed=6)]
    given, results = [v.requires_grad_() for v in given], []
    starts = None
    if share is not None:
        starts = torch.rand(b, length, generator=torch.Generator().manual_seed(0)) < share
    for form in (mimo.mimo_trapezoid, mimo.mimo_trapezoid_ref):
        y, state = form(*given[:6], TrapezoidState(*given[6:]), starts)
        out = [y, *state]
        weights = [torch.linspace(-1, 1, v.numel()).view(v.shape).to(v) for v in out]
        results.append([*out, *torch.autograd.grad(out, given, weights)])
    for fast, loop in zip(*results, strict=True):
        assert_close(fast, loop)


def test_activations_by_value_and_slope():
    x = torch.tensor([-99.0, -1.0, 0.0, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    y = heavy_tail(x)
    assert_close(y, torch.tensor([0.01, 0.5, 1.0, 2.0, 10.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert_close(slope, torch.tensor([1e-4, 0.25, 1.0, 1.0, 1.0], dtype=torch.float64))


def test_decay_rates_have_a_floor():
    mixer = make(Mamba3Spec(d_state=4, head_dim=4, A_floor=0.5))
    with torch.no_grad():
        mixer.in_proj.weight[-mixer.spec.n_angles - 12 : -mixer.spec.n_angles - 6].mul_(9)
    _, _, dt, log_decay, *_ = mixer._streams(3 * inputs(2, 50, 12))
    rate = -log_decay / dt
    assert rate.min() > 0.5 - 1e-9
    assert (rate < 0.5 + 1e-9).any()
    assert (rate > 1).any()


def test_angles_are_summed_within_a_document_and_wrapped():
    speed, angle = inputs(2, 9, 3, 2).mul(4), inputs(2, 3, 2).abs()
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 0] = starts[0, 4] = starts[1, 8] = True
    actual, running = summed_angles(speed, angle, starts), angle
    for t in range(9):
        running = torch.where(starts[:, t, None, None], 0.0, running) + speed[:, t]
        running = running.remainder(2 * math.pi)
        assert_close(actual[:, t], running)


def test_angles_of_a_long_input_keep_their_digits():
    speed = torch.full((1, 30_000, 1, 1), 3.0)
    angle = summed_angles(speed, torch.zeros(1, 1, 1), None)[0, -1, 0, 0]
    assert abs(angle - 90_000 % (2 * math.pi)) < 1e-6


def test_rotation_turns_neighbouring_pairs_and_leaves_the_rest():
    v, angle = inputs(2, 3, 7), inputs(2, 3, 2)
    turned = rotate_pairs(v, turns(angle))
    pairs = torch.view_as_complex(v[..., :4].unflatten(-1, (2, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
    assert_close(turned[..., :4], expected.flatten(-2))
    assert torch.equal(turned[..., 4:], v[..., 4:])


def test_initialisation_is_the_published_one():
    mixer = make(Mamba3Spec(d_state=8, head_dim=2), 256, torch.float32, noise=0.0)
    for ones in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.B_norm.weight, mixer.C_norm.weight):
        assert torch.equal(ones, torch.ones_like(ones))
    assert mixer.B_bias.shape == (256, 1, 8)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() > 0.999e-3
    assert dt.max() < 1.001e-1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.2  # log-uniform
    for weight, bound in (
        (mixer.in_proj.weight, 256**-0.5),
        (mixer.out_proj.weight, 512**-0.5 / math.sqrt(3)),
    ):
        assert 0.98 * bound < weight.abs().max() <= bound


def test_float32_parameters_survive_bfloat16():
    mixer = make(Mamba3Spec(d_state=4, head_dim=4), dtype=torch.float32).to(torch.bfloat16)
    kept = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert kept == {*Mamba3.float32_parameters, "B_norm.weight", "C_norm.weight"}
    out = mixer(inputs(2, 9, 12, dtype=torch.bfloat16))
    assert out.y.dtype == torch.bfloat16
    assert {leaf.dtype for leaf in out.state} == {torch.float32}
    assert {leaf.dtype for leaf in mixer.init_state(2, dtype=torch.bfloat16)} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 7}, "expand: 2.0 times d_model 12 makes 3.42857 heads of 7 .* expand = 1.75"),
        ({"n_groups": 4}, "n_groups: 4 does not divide the 6 heads"),
        ({"d_state": 0}, "d_state: 0 is not positive"),
        ({"d_state": 2}, "rope_fraction: 0.5 of d_state 2 is not at least one pair"),
        ({"rope_fraction": 1.5}, "rope_fraction: 1.5 of d_state 128 .* more than all"),
        ({"a_activation": "relu"}, "a_activation: 'relu' is not one of"),
        ({"A_floor": 0.0}, "A_floor: 0.0 is not positive"),
        ({"dt_min": 0.2}, r"dt_min: 0.2 is not in \(0, dt_max 0.1\]"),
    ],
)
def test_rules(fields, message):
    with pytest.raises(SpecError, match=message):
        Mamba3Spec.from_dict({"head_dim": 4, **fields}).check(12, "")
