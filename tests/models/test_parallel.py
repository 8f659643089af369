"""Mixers side by side: what each mode computes, what they share, what a spec may hold."""

import json

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.call import Call
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.bidirectional import BidirectionalSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.parallel import ParallelSpec
from kizzasi.models.mixers.routed import RoutedSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec

MAMBA, HEADS, RWKV7 = MambaSpec(d_state=4), AttentionSpec(n_heads=2), RWKV7Spec(head_dim=4)


def build(spec, d=8):
    mixer = spec.build(LayerContext(d))
    mixer.reset_parameters(1, torch.Generator().manual_seed(0))
    return mixer.double()


def model(*mixers, **fields):
    spec = ModelSpec(8, tuple(BlockSpec(m) for m in mixers), Tokens(11), **fields)
    return build_model(spec, dtype=torch.float64)


def sequence(t=12, d=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, t, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("combine", ["sum", "weighted", "concat"])
def test_every_mode_is_what_its_formula_says(combine):
    layer, x = build(ParallelSpec((MAMBA, HEADS), combine)), sequence()
    a, b = (mixer(x).y for mixer in layer.mixers)
    if combine == "sum":
        expected = a + b
    elif combine == "concat":
        expected = torch.cat([a, b], -1) @ layer.out_proj.weight.mT
    else:
        assert_close(layer(x).y, (a + b) / 2)  # they start equal
        with torch.no_grad():
            layer.mix_logits.copy_(torch.tensor([0.0, 3.0]).log1p())
        expected = (a + 4 * b) / 5
    assert_close(layer(x).y, expected)


def test_one_branch_is_the_mixer_itself():
    """Also where layers share tensors: the same seed then draws the same weights."""
    ids = torch.arange(9)[None]
    plain = model(RWKV7, MAMBA, RWKV7)
    wrapped = model(ParallelSpec((RWKV7,)), ParallelSpec((MAMBA,)), ParallelSpec((RWKV7,)))
    nested = model(ParallelSpec((ParallelSpec((RWKV7,)),)), MAMBA, RoutedSpec((RWKV7,)))
    assert torch.equal(plain(ids).logits, wrapped(ids).logits)
    keys = [sum("v0" in k for k in m.state_dict()) for m in (plain, wrapped, nested)]
    assert keys == [1, 1, 1]


def test_who_is_the_first_to_share_a_value():
    """The first RWKV-7 in running order offers v_first; a bidirectional keeps to itself."""
    pair = ParallelSpec((HEADS, RWKV7, RWKV7))
    names = model(BidirectionalSpec(RWKV7), pair, RWKV7, pair).state_dict()
    takers = [name.removesuffix(".v0") for name in names if name.endswith(".v0")]
    assert takers == [
        "blocks.1.mixer.mixers.2",
        "blocks.2.mixer",
        "blocks.3.mixer.mixers.1",
        "blocks.3.mixer.mixers.2",
    ]


def test_the_second_takes_the_value_of_the_first():
    layer, x = build(ParallelSpec((RWKV7, RWKV7)).settle(False)[0]), sequence()
    first, second = layer.mixers
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    out = first(x)
    expected = out.y + second(x, call=Call.of(x).offering(out.shared)).y
    got = layer(x)
    assert_close(got.y, expected)
    assert_close(got.shared["v_first"], out.shared["v_first"])


def test_window_and_causality_follow_the_mixers():
    near = AttentionSpec(n_heads=2, window=5)
    assert ParallelSpec((near, AttentionSpec(n_heads=2, window=7))).context_window == 7
    assert ParallelSpec((near, MAMBA)).context_window == float("inf")
    assert ParallelSpec((near, MAMBA)).causal
    assert not ParallelSpec((near, BidirectionalSpec(MAMBA))).causal
    layer, x = build(ParallelSpec((MAMBA, BidirectionalSpec(MAMBA)))), sequence()
    assert layer(x).y.shape == x.shape


def test_nested_specs_are_read_strictly():
    spec = ModelSpec(8, (BlockSpec(ParallelSpec((MAMBA, HEADS), "concat")),), Tokens(11))
    data = json.loads(spec.canonical_json())
    assert ModelSpec.from_dict(data) == spec
    assert ModelSpec.from_dict(data).digest == spec.digest
    data["blocks"][0]["mixer"]["mixers"][0]["d_sate"] = 3
    with pytest.raises(SpecError, match=r"blocks\[0\]\.mixer\.mixers\[0\]\.d_sate: unknown; did"):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (ParallelSpec(()), r"blocks\[0\]\.mixer\.mixers: empty; give at least one mixer"),
        (
            ParallelSpec((MAMBA, AttentionSpec(n_heads=3))),
            r"blocks\[0\]\.mixer\.mixers\[1\]\.n_heads",
        ),
        (
            ParallelSpec((ParallelSpec((MambaSpec(d_state=0),)),)),
            r"blocks\[0\]\.mixer\.mixers\[0\]\.mixers\[0\]\.d_state: 0 is not positive",
        ),
    ],
)
def test_broken_rules_are_named(mixer, message):
    with pytest.raises(SpecError, match=message):
        model(mixer)
