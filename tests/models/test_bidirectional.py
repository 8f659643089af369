"""Reading both ways: what is reversed, what is tied, and what a model that does so refuses."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, SignalPredictor, Tokens, build_model
from kizzasi.models.call import Call, document_starts
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import ExpertChoice
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.bidirectional import BidirectionalSpec, reversal
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.train.leak import find_leak

MAMBA, HEADS, RWKV7 = MambaSpec(d_state=4), AttentionSpec(n_heads=2), RWKV7Spec(head_dim=4)
mixers = pytest.mark.parametrize("mixer", [MAMBA, HEADS, RWKV7], ids=lambda m: m.kind)


def build(spec, d=8):
    layer = spec.build(LayerContext(d, index=1, n_layers=2))
    generator = torch.Generator().manual_seed(0)
    layer.reset_parameters(2, generator)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


def sequence(t=12, d=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, t, d, generator=generator, dtype=torch.float64)


def test_documents_are_reversed_where_they_stand():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [-1, -1, 0, 0, 0, 0], [-1, 3, 3, 3, 4, 5]])
    expected = [[2, 1, 0, 4, 3, 5], [1, 0, 5, 4, 3, 2], [0, 3, 2, 1, 4, 5]]
    assert reversal(document_starts(ids)).tolist() == expected
    assert reversal(torch.zeros(1, 1, dtype=torch.bool)).tolist() == [[0]]


@pytest.mark.parametrize("combine", ["sum", "mean", "concat"])
def test_every_mode_is_what_its_formula_says(combine):
    layer, x = build(BidirectionalSpec(MAMBA, combine)), sequence()
    a, b = layer.forwards(x).y, layer.backwards(x.flip(1)).y.flip(1)
    if combine == "concat":
        expected = torch.cat([a, b], -1) @ layer.out_proj.weight.mT
    else:
        expected = (a + b) / (2 if combine == "mean" else 1)
    assert_close(layer(x).y, expected)


@mixers
def test_tied_weights_make_it_symmetric_in_time(mixer):
    tied, free = (build(BidirectionalSpec(mixer, tied=t)) for t in (True, False))
    x = sequence()
    assert_close(tied(x.flip(1)).y, tied(x).y.flip(1))
    assert not torch.allclose(free(x.flip(1)).y, free(x).y.flip(1))
    n = [sum(p.numel() for p in layer.parameters()) for layer in (tied, free)]
    assert n[1] == 2 * n[0]


@mixers
def test_packed_and_padded_documents_stay_apart(mixer):
    layer, x = build(BidirectionalSpec(mixer)), sequence(t=11)[:1]
    ids = torch.tensor([[-1] * 2 + [0] * 4 + [1] * 1 + [2] * 4])
    y = layer(x, call=Call.of(x, ids)).y
    for here in (slice(2, 6), slice(6, 7), slice(7, 11)):
        assert_close(y[:, here], layer(x[:, here]).y)


def test_losses_of_both_directions_add_up():
    from kizzasi.models.mixers.routed import RoutedSpec

    layer, x = build(BidirectionalSpec(RoutedSpec((MAMBA, HEADS)))), sequence()
    a, b = layer.forwards(x).aux, layer.backwards(x.flip(1)).aux
    total = layer(x).aux["routed_balance"]
    assert_close(total, a["routed_balance"] + b["routed_balance"])


def model(*blocks, stem=None):
    return build_model(ModelSpec(8, blocks, stem or Tokens(11)), dtype=torch.float64)


REFUSED = {
    "mixer": (BlockSpec(BidirectionalSpec(MAMBA)), r"blocks\[1\]\.mixer: 'bidirectional' lets"),
    "channel": (
        BlockSpec(MAMBA, MoESpec(n_experts=2, router=ExpertChoice(), normalize="all")),
        r"blocks\[1\]\.channel: 'moe' lets",
    ),
}


@pytest.mark.parametrize("block", REFUSED)
def test_a_model_that_is_not_causal_refuses_what_needs_it(block):
    block, message = REFUSED[block]
    odd, ids = model(BlockSpec(HEADS), block), torch.arange(6)[None]
    assert not odd.spec.causal
    assert odd.spec.context_window == float("inf")
    out = odd(ids)
    for refused in (
        lambda: odd(ids, out.state),
        lambda: odd.step(ids[:, 0], out.state),
        lambda: odd.generate(ids, 1),
    ):
        with pytest.raises(SpecError, match=message):
            refused()
    assert find_leak(odd) == "declares that outputs depend on later inputs"
    assert model(BlockSpec(HEADS)).spec.causal


def test_signals_cannot_be_streamed_through_it():
    predictor = SignalPredictor(model(BlockSpec(BidirectionalSpec(MAMBA)), stem=Signal(2, 2)))
    with pytest.raises(SpecError, match=r"blocks\[0\]\.mixer: 'bidirectional'.*rules out step"):
        predictor.step(torch.zeros(2, dtype=torch.float64))
    layer = build(BidirectionalSpec(MAMBA))
    with pytest.raises(SpecError, match="use 'mamba' by itself"):
        layer.step(torch.zeros(1, 8).double(), ())


def test_a_mixer_that_reads_both_ways_already_is_refused():
    block = BlockSpec(BidirectionalSpec(BidirectionalSpec(MAMBA)))
    message = r"blocks\[0\]\.mixer\.mixer: 'bidirectional' reads later tokens by itself"
    with pytest.raises(SpecError, match=message):
        model(block)
    with pytest.raises(SpecError, match=r"blocks\[0\]\.mixer\.mixer\.d_state: 0 is not"):
        model(BlockSpec(BidirectionalSpec(MambaSpec(d_state=0))))
