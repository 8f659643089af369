"""The long convolution: FFT against the direct sum, its reach, its filter."""

import math

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.long_conv import LongConvSpec
from kizzasi.models.ops.conv import causal_conv1d_ref
from kizzasi.models.ops.long_conv import long_conv1d

LENGTHS = (1, 2, 7, 63, 64, 65, 100)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def document_starts(t):
    starts = torch.zeros(2, t, dtype=torch.bool)
    starts[0, t // 3] = starts[0, t // 2] = starts[1, -1] = True
    return starts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("k", [1, 2, 9, 80])
@pytest.mark.parametrize("t", LENGTHS)
def test_fft_equals_the_direct_sum(t, k, carried, packed):
    x, weight, state = normal(2, t, 3), normal(3, k, seed=1), normal(2, 3, k - 1, seed=2)
    decay = torch.tensor([1.0, 0.9, 1e-3], dtype=torch.float64)[:, None]
    weight = weight * decay ** torch.arange(k - 1, -1, -1)
    starts = document_starts(t) if packed else None
    results = []
    for conv in (causal_conv1d_ref, long_conv1d):
        live = [x.clone(), weight.clone(), *([state.clone()] if carried else [])]
        for tensor in live:
            tensor.requires_grad_()
        before = live[2] if carried else None
        if conv is causal_conv1d_ref:
            y, after = conv(live[0], live[1], None, before, starts)
        else:
            y, after = conv(live[0], live[1], before, starts)
        loss = (y * normal(*y.shape, seed=3)).sum() + (after * normal(*after.shape, seed=4)).sum()
        results.append((y, after, *torch.autograd.grad(loss, live)))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


def test_nothing_leaks_between_documents_not_even_rounding():
    x, weight = normal(1, 50, 3), normal(3, 64, seed=1)
    starts = torch.zeros(1, 50, dtype=torch.bool)
    starts[0, 20] = True
    loud = x.clone()
    loud[:, :20] *= 1e9
    alone, _ = long_conv1d(x, weight, None, starts)
    beside, _ = long_conv1d(loud, weight, None, starts)
    assert torch.equal(alone[:, 20:], beside[:, 20:])


def build(**fields):
    mixer = LongConvSpec(n_bands=3, filter_width=8, **fields).build(LayerContext(d_model=4))
    mixer.reset_parameters(1, torch.Generator().manual_seed(0))
    return mixer.double()


def test_the_filter_is_a_network_over_positions_in_a_window():
    layer = build(max_len=10).filter
    d, length = 4, 10
    for back in range(length):
        share = back / length
        angles = [2 * math.pi * f * share for f in range(3)]
        features = [share, *map(math.cos, angles), *map(math.sin, angles)]
        h = torch.tensor(features, dtype=torch.float64)
        for linear in layer.layers[:3]:
            h = torch.sin(14.0 * linear(h))
        h = layer.layers[3](h)
        for c in range(d):
            rate = math.log(100) * (1 / 1.5 + c / (d - 1) * (1 / 0.3 - 1 / 1.5))
            window = torch.tensor(math.exp(-rate * share), dtype=torch.float64)
            assert_close(layer(h)[c, length - 1 - back], h[c] * window)


@pytest.mark.parametrize(("max_len", "d_conv"), [(1, 1), (5, 3), (8, 1)])
def test_it_reaches_exactly_as_far_back_as_it_says(max_len, d_conv):
    mixer, x = build(max_len=max_len, d_conv=d_conv), normal(1, 24, 4)
    reach = mixer.spec.context_window
    y = mixer(x).y[:, -1]
    for back, matters in ((reach - 1, True), (reach, False)):
        other = x.clone()
        other[:, 23 - back] += 1.0
        moved = (mixer(other).y[:, -1] - y).abs().max()
        assert (moved > 1e-9) if matters else (moved < 1e-14)


def test_the_filter_keeps_its_precision():
    mixer = build(max_len=16).float()
    expected = mixer.filter(torch.zeros(1))
    low = mixer.to(torch.bfloat16)
    assert low.in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(low.filter(torch.zeros(1)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(low.filter(torch.zeros(1)), expected)


def test_broken_rules_are_named():
    for field in ("max_len", "d_conv", "n_bands", "filter_width", "sine_frequency"):
        spec = ModelSpec(8, (BlockSpec(LongConvSpec(**{field: 0})),), Tokens(5))
        with pytest.raises(SpecError, match=rf"blocks\[0\]\.mixer\.{field}: 0.* is not positive"):
            build_model(spec)
