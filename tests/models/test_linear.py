"""Products of linear layers: engines agree, and layers stay `nn.Linear`s to all others."""

import pytest
import torch
from tolerance import assert_close
from torch import nn

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MLPSpec
from kizzasi.models.mixers import AttentionSpec
from kizzasi.models.ops.linear import LINEAR, linear, linear_ref
from kizzasi.models.parts.linear import Linear

CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(t, n_in, n_out):
    made = normal(2, t, n_in), normal(n_out, n_in, seed=1) / n_in**0.5, normal(n_out, seed=2)
    return [x.requires_grad_() for x in made]


def test_the_definition():
    given = [x.double() for x in layer(3, 5, 4)]
    assert_close(linear_ref(*given), linear(*given))
    assert_close(linear_ref(*given[:2]), linear(*given[:2]))


@pytest.mark.skipif(LINEAR.resolve("auto", CPU) != "native", reason="torch's own products are best")
def test_native_products_and_their_gradients_agree():
    for inputs in (layer(300, 96, 80), layer(300, 96, 80)[:2], layer(257, 130, 67)):
        dy = normal(2, inputs[0].shape[1], len(inputs[1]), seed=3) / 20
        found = []
        for engine in ("native", "torch"):
            y = LINEAR.pick(engine, CPU)(*inputs)
            found.append([y, *torch.autograd.grad(y, inputs, dy)])
        assert type(LINEAR.pick("native", CPU)(*inputs).grad_fn).__name__ == "_LinearBackward"
        for a, b in zip(*found, strict=True):
            assert_close(a, b)


@pytest.mark.skipif(LINEAR.resolve("auto", CPU) != "native", reason="torch's own products are best")
def test_what_is_left_to_torch():
    native, inputs = LINEAR.pick("native", CPU), layer(300, 96, 80)
    x, weight, bias = inputs
    small = native(x[:, :2], weight, bias)
    double = native(x.double(), weight.double(), bias.double())
    for y in (small, double):
        assert type(y.grad_fn).__name__ != "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert native(x, weight, bias).dtype == torch.bfloat16
    first = [
        torch.autograd.grad(f(*inputs).square().sum(), x, create_graph=True)[0]
        for f in (native, linear)
    ]
    second = [torch.autograd.grad(g.square().mean(), weight)[0] for g in first]
    assert torch.allclose(second[0], second[1], rtol=1e-3, atol=1e-3 * float(second[1].abs().max()))


def test_layers_of_a_model_are_linear_layers_still():
    spec = ModelSpec(16, (BlockSpec(AttentionSpec(2), MLPSpec()),), Tokens(7))
    ours, plain = build_model(spec), build_model(spec, engine="torch")
    kinds = {type(m) for m in ours.modules() if isinstance(m, nn.Linear)}
    assert kinds == {Linear}
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert repr(ours.blocks) == repr(plain.blocks)
    x = torch.randn(2, 3, 16)
    for layer in (m for m in ours.modules() if isinstance(m, nn.Linear)):
        x = x[..., :1].expand(2, 3, layer.in_features)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
