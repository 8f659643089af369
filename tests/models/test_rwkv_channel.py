"""RWKV's channel mixes of versions 4, 6 and 7: what they compute, names, initialisation."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.mixer import LayerContext

NAMES = {
    4: {"time_mix_k", "time_mix_r", "key.weight", "receptance.weight", "value.weight"},
    6: {"time_maa_k", "time_maa_r", "key.weight", "receptance.weight", "value.weight"},
    7: {"x_k", "key.weight", "value.weight"},
}
versions = pytest.mark.parametrize("version", list(NAMES))


def build(version, d=6, hidden=10, index=1, n_layers=4, noise=0.3):
    module = RWKVChannelSpec(hidden, version).build(LayerContext(d, index, n_layers))
    g = torch.Generator().manual_seed(0)
    module.reset_parameters(n_layers, g)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(noise * torch.randn(p.shape, generator=g))
    return module.double()


@versions
def test_computes_the_published_formula(version):
    """Written out token by token; version 4 stores the share of the present token."""
    module = build(version)
    p = dict(module.named_parameters())
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, before = module(x).y, torch.zeros(2, 6, dtype=torch.float64)
    for t in range(9):
        now = x[:, t]
        if version == 4:
            of_key = now * p["time_mix_k"] + before * (1 - p["time_mix_k"])
            of_gate = now * p["time_mix_r"] + before * (1 - p["time_mix_r"])
        elif version == 6:
            of_key = now + (before - now) * p["time_maa_k"]
            of_gate = now + (before - now) * p["time_maa_r"]
        else:
            of_key, of_gate = now + (before - now) * p["x_k"], None
        expected = torch.relu(of_key @ p["key.weight"].T) ** 2 @ p["value.weight"].T
        if of_gate is not None:
            expected = torch.sigmoid(of_gate @ p["receptance.weight"].T) * expected
        assert_close(y[:, t], expected)
        before = now


@versions
def test_parameters_are_named_as_in_rwkv_lm(version):
    assert set(build(version).state_dict()) == NAMES[version]


@versions
def test_initialisation(version):
    """Deeper layers look back less; the output and the gate's weight start at zero."""
    d, hidden, index, n_layers = 6, 24, 1, 4
    module = build(version, d, hidden, index, n_layers, noise=0.0)
    left = 1 - index / n_layers
    for i in range(d):
        present = (i / d) ** (left**4 if version == 7 else left)
        share = present if version == 4 else 1 - present
        for name in NAMES[version]:
            if not name.endswith("weight"):
                assert module.get_parameter(name)[i].item() == pytest.approx(share, abs=1e-6)
    square = 1.0 if version == 7 else hidden / d
    assert_close(
        module.key.weight.T @ module.key.weight, square * torch.eye(d).double(), torch.float32
    )
    assert not module.value.weight.any()
    assert module.receptance is None or not module.receptance.weight.any()


def test_seven_is_the_default_and_five_is_no_version():
    assert RWKVChannelSpec() == RWKVChannelSpec(version=7)
    with pytest.raises(SpecError, match=r"channel\.version: 5 is not one of \[4, 6, 7\]"):
        RWKVChannelSpec.from_dict({"version": 5}, "channel")
    with pytest.raises(SpecError, match="hidden: 0 is not positive"):
        RWKVChannelSpec(hidden=0, version=6).check(8, "channel")
