"""The Mamba-2 mixer: parity with transformers, step size limits, initialisation, rules of its spec.

What every mixer must do (forward = fold of step, splits, packing, costs) is in the exam.
"""

import math

import pytest
import torch
from peers import cache_argument
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.mamba2 import Mamba2, Mamba2Spec

SMALL = Mamba2Spec(d_state=5, head_dim=4, n_groups=2)


def make(spec=SMALL, d_model=12, dtype=torch.float64):
    mixer = spec.build(LayerContext(d_model, 1, 3))
    mixer.reset_parameters(3, torch.Generator().manual_seed(0))
    return mixer.to(dtype)


def inputs(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def transformers(monkeypatch):
    """transformers, held to float64: it rounds A, x, B, C and the norm to float32."""
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    to = torch.Tensor.to

    def keep(x, *args, **kwargs):
        return to(x, *[torch.float64 if a is torch.float32 else a for a in args], **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    return library


def shake(module):
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(0.3 * inputs(*p.shape, seed=seed))
    return module


def assert_parity(ours, theirs, t=19):
    """Outputs and every gradient, from the same random weights."""
    ours.load_state_dict(theirs.state_dict())
    x, y = (inputs(2, t, 12).requires_grad_() for _ in range(2))
    out, expected = ours(x).y, theirs(y)
    assert_close(out, expected)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(x.grad, y.grad, msg="input")
    for name, p in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, p.grad, msg=name)


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.3, 0.8)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_transformers(transformers, limit, bias, groups):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=12,
        state_size=5,
        num_heads=6,
        head_dim=4,
        n_groups=groups,
        num_hidden_layers=1,
        use_bias=bias,
        use_conv_bias=bias,
        time_step_limit=limit,
        chunk_size=8,
    )
    theirs = shake(Mamba2Mixer(config, layer_idx=0).double())
    high = None if limit[1] == math.inf else limit[1]
    spec = Mamba2Spec(
        d_state=5,
        head_dim=4,
        n_groups=groups,
        bias=bias,
        conv_bias=bias,
        dt_limit=(limit[0], high),
        norm_eps=config.layer_norm_epsilon,
    )
    ours = make(spec)
    assert_parity(ours, theirs)

    # Prefill and steps against theirs in one call: their own step forgets the limits.
    x = inputs(2, 12, 12)
    out, ys = ours(x[:, :9]), []
    ys, state = [out.y], out.state
    for t in range(9, 12):
        out = ours.step(x[:, t], state)
        ys.append(out.y[:, None])
        state = out.state
    assert_close(torch.cat(ys, 1), theirs(x))


def test_step_equals_transformers_step(transformers):
    from transformers import DynamicCache
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=12, state_size=5, num_heads=6, head_dim=4, n_groups=2, num_hidden_layers=1
    )
    theirs = shake(Mamba2Mixer(config, layer_idx=0).double())
    ours = make()
    ours.load_state_dict(theirs.state_dict())
    cache, x = DynamicCache(config=config), inputs(2, 9, 12)
    out = ours(x[:, :6])
    assert_close(out.y, theirs(x[:, :6], **{cache_argument(theirs): cache}))
    for t in range(6, 9):
        out = ours.step(x[:, t], out.state)
        assert_close(out.y[:, None], theirs(x[:, t : t + 1], **{cache_argument(theirs): cache}))


@pytest.mark.parametrize(("norm", "before"), [(False, False), (True, False), (True, True)])
def test_every_kind_of_norm_equals_falcon_h1(transformers, norm, before):
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

    config = transformers.FalconH1Config(
        hidden_size=12,
        mamba_d_ssm=20,
        mamba_n_heads=4,
        mamba_d_head=5,
        mamba_d_state=3,
        mamba_n_groups=2,
        mamba_rms_norm=norm,
        mamba_norm_before_gate=before,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    theirs = FalconH1Mixer(config, layer_idx=0).double()
    theirs.mup_vector = torch.ones((), dtype=torch.float64)
    spec = Mamba2Spec(
        d_state=3,
        head_dim=5,
        n_groups=2,
        expand=20 / 12,
        rms_norm=norm,
        norm_before_gate=before,
        norm_eps=config.rms_norm_eps,
    )
    spec.check(12, "")
    assert_parity(make(spec), shake(theirs))


def test_step_sizes_stay_within_their_limits_in_step_too():
    mixer, free = make(Mamba2Spec(d_state=4, head_dim=4, dt_limit=(0.02, 0.05))), make()
    x = 3 * inputs(2, 12, 12)
    state, ys = mixer.init_state(2, dtype=torch.float64), []
    for t in range(12):
        out = mixer.step(x[:, t], state)
        ys.append(out.y)
        state = out.state
    assert_close(torch.stack(ys, 1), mixer(x).y)
    _, _, dt = mixer._project(x)
    _, dt, *_ = mixer._streams(mixer._project(x)[1], dt)
    assert dt.min() >= 0.02
    assert dt.max() <= 0.05
    _, dt, *_ = free._streams(*free._project(x)[1:])
    assert dt.min() < 0.02
    assert dt.max() > 0.05


def test_initialisation_is_the_papers():
    mixer = make(Mamba2Spec(head_dim=2, bias=True), d_model=256, dtype=torch.float32)
    rate = mixer.A_log.exp()
    assert rate.min() >= 1
    assert rate.max() <= 16.001
    assert abs(rate.mean() - 8.5) < 1
    assert torch.equal(mixer.D, torch.ones(256))
    assert torch.equal(mixer.norm.weight, torch.ones(512))
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() > 0.999e-3
    assert dt.max() < 1.001e-1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.2  # log-uniform
    for weight, bound in (
        (mixer.in_proj.weight, 256**-0.5),
        (mixer.out_proj.weight, 512**-0.5 / math.sqrt(3)),
        (mixer.conv1d.weight, 0.5),
    ):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert not mixer.in_proj.bias.any()
    floored = make(Mamba2Spec(head_dim=4, dt_min=1e-6, dt_max=1e-5, dt_floor=1e-3)).dt_bias
    expected = torch.full_like(floored, 1e-3)
    assert_close(torch.nn.functional.softplus(floored), expected, torch.float32)


def test_float32_parameters_survive_bfloat16():
    mixer = make(dtype=torch.float32).to(torch.bfloat16)
    kept = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert kept == {*Mamba2.float32_parameters, "norm.weight"}
    out = mixer(inputs(2, 9, 12, dtype=torch.bfloat16))
    assert (out.y.dtype, out.state.ssm.dtype) == (torch.bfloat16, torch.float32)
    state = mixer.init_state(2, dtype=torch.bfloat16)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 7}, "expand: 2.0 times d_model 12 makes 3.42857 heads of 7 .* expand = 1.75"),
        ({"expand": 0.0}, "expand: 0.0 times d_model 12 makes 0 heads"),
        ({"n_groups": 4}, "n_groups: 4 does not divide the 6 heads"),
        ({"n_groups": 0}, "n_groups: 0 is not positive"),
        ({"d_state": 0}, "d_state: 0 is not positive"),
        ({"dt_min": 0.2}, r"dt_min: 0.2 is not in \(0, dt_max 0.1\]"),
        ({"dt_floor": 0.0}, "dt_floor: 0.0 is not positive"),
        ({"norm_eps": 0.0}, "norm_eps: 0.0 is not positive"),
        ({"dt_limit": [0.1, 0.01]}, r"dt_limit: \[0.1, 0.01\] is not \[low, high\]"),
        ({"dt_limit": [0.1]}, r"dt_limit: \[0.1\] is not \[low, high\]"),
        ({"dt_limit": [None, 0.1]}, r"dt_limit: \[None, 0.1\] is not \[low, high\]"),
    ],
)
def test_rules(fields, message):
    with pytest.raises(SpecError, match=message):
        Mamba2Spec.from_dict({"head_dim": 4, **fields}).check(12, "blocks[0].mixer")
