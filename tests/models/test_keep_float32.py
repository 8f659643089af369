"""What must not be rounded is stored in float32, and used in it whatever it is stored in."""

import pytest
import torch
from tolerance import assert_close
from torch import nn

from kizzasi.models.norm import HeadNorm, KeepFloat32, Norm, WideLinear

LOW = [torch.bfloat16, torch.float16]


class Layer(KeepFloat32):
    float32_parameters = ("A_log", "dt_proj.weight")

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.linspace(0.1, 0.9, 4, dtype=torch.float32))
        self.dt_proj = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)


def dtypes(layer):
    return {name: p.dtype for name, p in layer.named_parameters()}


def assert_kept(layer, low):
    kept = dtypes(layer)
    assert kept.pop("A_log") == kept.pop("dt_proj.weight") == torch.float32
    assert set(kept.values()) == {low}


@pytest.mark.parametrize("low", LOW)
def test_loading_low_precision_by_assignment_widens_what_is_kept(low):
    layer = Layer()
    layer.load_state_dict({k: v.to(low) for k, v in layer.state_dict().items()}, assign=True)
    assert_kept(layer, low)
    given = {k: v.to(low) for k, v in Layer().state_dict().items()}
    layer.load_state_dict(given, assign=True)
    assert {v.dtype for v in given.values()} == {low}, "the caller's dictionary was changed"


@pytest.mark.parametrize("low", LOW)
def test_moving_widens_what_was_built_under_a_low_default_dtype(low):
    torch.set_default_dtype(low)
    try:
        with torch.device("meta"):
            layer = Layer()
        layer.A_log.data = layer.A_log.data.to(low)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_kept(layer.to_empty(device="cpu"), low)
    layer.A_log.data = layer.A_log.data.to(low)
    assert layer.to("cpu").A_log.dtype == torch.float32


@pytest.mark.parametrize("low", LOW)
def test_the_originals_of_a_parametrised_weight_are_kept(low):
    layer = Layer()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    nn.utils.parametrizations.weight_norm(layer.dt_proj)
    nn.utils.parametrizations.weight_norm(layer.other)
    layer.to(low)
    assert layer.dt_proj.weight.dtype == torch.float32
    assert layer.other.weight.dtype == low
    assert_close(layer.dt_proj.weight, before["dt_proj.weight"])


def rounded(module, low):
    """The module as FSDP2's mixed precision shows it to itself: with low-precision parameters."""
    for child in module.modules():
        for name, p in list(child._parameters.items()):
            if p is not None:
                child._parameters[name] = nn.Parameter(p.detach().to(low))
    return module


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "module",
    [
        lambda: Norm("rms", 8),
        lambda: Norm("rms_plus_one", 8),
        lambda: Norm("layer", 8),
        lambda: HeadNorm(8),
        lambda: WideLinear(8, 8),
        lambda: WideLinear(8, 8, bias=False),
    ],
)
def test_rounded_parameters_do_not_lower_the_precision_of_the_sums(module, autocast, low):
    module = rounded(module(), low)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.linspace(-0.5, 1.5 + i, p.numel()).view(p.shape))
    x = torch.linspace(-1, 2, 48).view(6, 1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = module(x)
    assert {p.dtype for p in module.parameters()} == {low}
    assert y.dtype == torch.float32
    y.sum().backward()
    assert_close(y, module.double()(x.double()).float())


def test_a_wide_linear_takes_low_precision_and_answers_in_float32():
    layer = WideLinear(8, 3).bfloat16()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    x = torch.linspace(-1, 1, 16).view(2, 8)
    assert_close(layer(x.bfloat16()), layer(x.bfloat16().float()))
    assert layer(x.bfloat16()).dtype == torch.float32
    assert layer.double()(x.double()).dtype == torch.float64
