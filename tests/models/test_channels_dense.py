"""The dense channel mixers: their formulas, widths and costs."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models.call import Call
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.mixer import ChannelSpec, LayerContext

SPECS = {
    "gelu": MLPSpec(),
    "gelu-bias": MLPSpec(hidden=10, bias=True),
    "gelu-tanh": MLPSpec(activation="gelu_tanh"),
    "relu2": MLPSpec(activation="relu2"),
    "swiglu": SwiGLUSpec(),
    "swiglu-narrow": SwiGLUSpec(hidden=5),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def build(spec, dtype=torch.float64):
    mixer = spec.build(LayerContext(16, n_layers=2))
    mixer.reset_parameters(2, torch.Generator().manual_seed(0))
    return mixer.to(dtype)


def test_mlp_is_up_activation_down():
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    activations = {
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "relu2": lambda z: z.clamp(min=0) ** 2,
    }
    for name, activation in activations.items():
        mixer = build(MLPSpec(activation=name))
        expected = activation(x @ mixer.up_proj.weight.T) @ mixer.down_proj.weight.T
        assert_close(mixer(x).y, expected)


def test_swiglu_gates_with_silu():
    x, mixer = torch.randn(2, 3, 16, dtype=torch.float64), build(SwiGLUSpec())
    gate, up = x @ mixer.gate_proj.weight.T, x @ mixer.up_proj.weight.T
    assert_close(mixer(x).y, (gate * torch.sigmoid(gate) * up) @ mixer.down_proj.weight.T)


def test_default_widths():
    assert MLPSpec().width(256) == 1024
    assert [SwiGLUSpec().width(d) for d in (16, 64, 256, 4096)] == [48, 176, 688, 10928]
    for d in range(1, 100):
        width = SwiGLUSpec().width(d)
        assert width % 8 == 0
        assert 0 <= width - 8 * d / 3 < 8


@every_spec
def test_tokens_are_independent_and_there_is_no_state(spec):
    mixer, x = build(spec), torch.randn(2, 7, 16, dtype=torch.float64)
    out = mixer(x, mixer.init_state(2), call=Call.of(x, torch.ones(2, 7, dtype=torch.int64)))
    assert out.state == mixer.init_state(2) == ()
    for t in range(7):
        step = mixer.step(x[:, t], ())
        assert_close(step.y, out.y[:, t])
        assert step.state == ()
    assert spec.context_window == 1


@every_spec
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7)])
def test_cost_is_what_is_measured(spec, batch, length):
    mixer = build(spec, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mixer(torch.randn(batch, length, 16))
    cost = spec.cost(LayerContext(16), length, batch)
    assert cost.flops == counter.get_total_flops()
    assert cost.params == cost.active_params == sum(p.numel() for p in mixer.parameters())
    assert cost.state_bytes == 0


@every_spec
def test_low_precision(spec):
    full, x = build(spec, torch.float32), torch.randn(2, 9, 16)
    expected = full(x).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = full(x).y
    low = build(spec, torch.bfloat16)(x.bfloat16()).y
    for y in (mixed, low):
        assert y.dtype == torch.bfloat16
        assert (y.float() - expected).abs().mean() < 0.05 * expected.std()


@every_spec
def test_round_trip_and_the_scale_of_the_last_layer(spec):
    assert ChannelSpec.from_dict(spec.to_dict()) == spec
    shallow, deep = build(spec), spec.build(LayerContext(16))
    deep.reset_parameters(8, torch.Generator().manual_seed(0))
    assert_close(shallow.down_proj.weight / 2, deep.down_proj.weight.double(), torch.float32)


@pytest.mark.parametrize("spec", [MLPSpec(hidden=0), SwiGLUSpec(hidden=-8)])
def test_check_names_the_rule(spec):
    with pytest.raises(SpecError, match=r"m.hidden: -?\d is not positive; give at least 1"):
        spec.check(16, "m")
