"""The Mamba-1 mixer: parity with transformers, initialisation, precision, rules of its spec.

What every mixer must do (forward = fold of step, splits, packing, costs) is in the exam.
"""

import math

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.mamba import Mamba, MambaSpec


def make(spec=None, d_model=12, dtype=torch.float64, seed=0):
    mixer = (spec or MambaSpec(d_state=4)).build(LayerContext(d_model, 1, 3))
    mixer.reset_parameters(3, torch.Generator().manual_seed(seed))
    return mixer.to(dtype)


def inputs(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_transformers(dtype, bias, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    if dtype == torch.float64:  # theirs rounds A, D and dt to float32; hold it to float64
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = transformers.MambaConfig(
        hidden_size=12, state_size=4, num_hidden_layers=1, use_bias=bias, use_conv_bias=bias
    )
    theirs = MambaMixer(config, layer_idx=0).to(dtype)
    shake(theirs)
    assert_parity(make(MambaSpec(d_state=4, bias=bias, conv_bias=bias), dtype=dtype), theirs, dtype)


def hold_to_float64(monkeypatch):
    """transformers' norms and scans round to float32."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, *args, **kwargs: to(
            x, *[torch.float64 if a is torch.float32 else a for a in args], **kwargs
        ),
    )


def test_weightless_inner_norm_equals_falcon_mamba(monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

    hold_to_float64(monkeypatch)
    config = transformers.FalconMambaConfig(
        hidden_size=12, state_size=4, time_step_rank=3, num_hidden_layers=1, mixer_rms_eps=1e-2
    )
    # Its own initialisation asks for norms that do not exist yet.
    theirs = FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False).double()
    shake(theirs)
    spec = MambaSpec(d_state=4, dt_rank=3, inner_norm="weightless", inner_norm_eps=1e-2)
    assert_parity(make(spec), theirs, torch.float64)


def test_inner_norm_with_weights_equals_jamba(monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    hold_to_float64(monkeypatch)
    config = transformers.JambaConfig(
        hidden_size=12, mamba_d_state=4, mamba_dt_rank=3, num_hidden_layers=1, rms_norm_eps=1e-2
    )
    theirs = JambaMambaMixer(config, layer_idx=0).double()
    shake(theirs)
    spec = MambaSpec(d_state=4, dt_rank=3, inner_norm="rms", inner_norm_eps=1e-2)
    assert_parity(make(spec), theirs, torch.float64)


def shake(module):
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(0.3 * inputs(*p.shape, dtype=p.dtype, seed=seed))


def assert_parity(ours, theirs, dtype):
    """Outputs and every gradient, from the same random weights."""
    ours.load_state_dict(theirs.state_dict())
    x, y = (inputs(2, 19, 12, dtype=dtype).requires_grad_() for _ in range(2))
    out, expected = ours(x).y, theirs(y)
    assert_close(out, expected)
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(x.grad, y.grad, msg="input")
    for name, p in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, p.grad, msg=name)


def test_step_and_split_equal_one_call():
    mixer, x = make(), inputs(2, 21, 12)
    whole = mixer(x)
    state, ys = mixer.init_state(2, dtype=torch.float64), []
    for t in range(9):
        out = mixer.step(x[:, t], state)
        ys.append(out.y)
        state = out.state
    rest = mixer(x[:, 9:], state)
    assert_close(torch.cat([torch.stack(ys, 1), rest.y], 1), whole.y)
    assert_close(rest.state.conv, whole.state.conv)
    assert_close(rest.state.ssm, whole.state.ssm)


def test_initialisation_is_the_papers():
    spec = MambaSpec(d_state=8, dt_min=1e-3, dt_max=1e-1, bias=True)
    mixer = make(spec, d_model=256, dtype=torch.float32)
    assert_close(mixer.A_log.exp(), torch.arange(1.0, 9).expand(512, 8))
    assert torch.equal(mixer.D, torch.ones(512))
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert dt.min() > 0.999e-3
    assert dt.max() < 1.001e-1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.2  # log-uniform
    for weight, bound in (
        (mixer.in_proj.weight, 256**-0.5),
        (mixer.dt_proj.weight, 16**-0.5),
        (mixer.out_proj.weight, 512**-0.5 / math.sqrt(3)),
        (mixer.conv1d.weight, 0.5),
    ):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()
    floored = make(MambaSpec(dt_min=1e-6, dt_max=1e-5, dt_floor=1e-3))
    bias = floored.dt_proj.bias
    assert_close(torch.nn.functional.softplus(bias), torch.full_like(bias, 1e-3), torch.float32)


def test_float32_parameters_survive_bfloat16():
    mixer = make(dtype=torch.float32).to(torch.bfloat16)
    low = {name for name, p in mixer.named_parameters() if p.dtype == torch.bfloat16}
    kept = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert kept == set(Mamba.float32_parameters) == {"A_log", "D", "dt_proj.weight", "dt_proj.bias"}
    assert "x_proj.weight" in low
    out = mixer(inputs(2, 9, 12, dtype=torch.bfloat16))
    assert (out.y.dtype, out.state.ssm.dtype) == (torch.bfloat16, torch.float32)
    state = mixer.init_state(2, dtype=torch.bfloat16)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expand": 1.3}, "expand: 1.3 times d_model 12 is 15.6, not a whole number"),
        ({"expand": 0.0}, "expand: 0.0 times d_model 12 is 0, not a whole number >= 1"),
        ({"d_state": 0}, "d_state: 0 is not positive"),
        ({"dt_rank": -1}, "dt_rank: -1 is not positive"),
        ({"dt_floor": 0.0}, "dt_floor: 0.0 is not positive"),
        ({"inner_norm": "layer"}, "inner_norm: 'layer' is not one of"),
        ({"inner_norm_eps": 0.0}, "inner_norm_eps: 0.0 is not positive"),
        ({"dt_min": 0.2}, r"dt_min: 0.2 is not in \(0, dt_max 0.1\]"),
    ],
)
def test_rules(fields, message):
    with pytest.raises(SpecError, match=message):
        MambaSpec.from_dict(fields).check(12, "blocks[0].mixer")


def test_whole_products_of_fractions_are_accepted():
    spec = MambaSpec(expand=1.1)
    spec.check(10, "")  # 1.1 * 10 is not 11 in binary
    assert spec.d_inner(10) == 11
    assert MambaSpec.from_dict({"expand": 2}) == MambaSpec()
