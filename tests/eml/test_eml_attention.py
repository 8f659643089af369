"""EML attention as a mixer: recurrence, masks, documents, costs, gradients, and a whole model."""

import pytest
import torch
from tolerance import assert_close

import kizzasi.eml  # noqa: F401  (registers the mixer)
from kizzasi.eml.attention import EmlAttentionSpec
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.call import Call
from kizzasi.models.mixer import LayerContext, MixerSpec

VARIANTS = [
    EmlAttentionSpec(),
    EmlAttentionSpec(n_heads=2, softmax="trained"),
    EmlAttentionSpec(n_heads=2, head_dim=3, depth=2),
    EmlAttentionSpec(n_heads=4, depth=0),
]
every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=repr)
D = 8


def build(spec):
    layer = spec.build(LayerContext(D)).double()
    generator = torch.Generator().manual_seed(0)
    layer.reset_parameters(1, generator)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def sequence(batch=2, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D, generator=generator, dtype=torch.float64)


@every_variant
def test_steps_and_splits_equal_one_call(spec):
    layer, x = build(spec), sequence()
    whole = layer(x)
    state, outputs = layer.init_state(2, dtype=torch.float64), []
    for token in x.unbind(1):
        y, state, *_ = layer.step(token, state)
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), whole.y)
    first = layer(x[:, :4])
    assert_close(torch.cat([first.y, layer(x[:, 4:], first.state).y], 1), whole.y)
    for got, expected in zip(state, whole.state, strict=True):
        assert_close(got.double(), expected.double())


@every_variant
def test_causality(spec):
    layer, x = build(spec), sequence()
    changed = x.clone()
    changed[:, 5:] += 1.0
    assert torch.equal(layer(x).y[:, :5], layer(changed).y[:, :5])


@every_variant
def test_packed_documents_and_left_padding(spec):
    layer, x = build(spec), sequence()
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 2, 2, 2, 2, 2]])
    packed = layer(x, call=Call.of(x, ids))
    for row, start, stop in ((0, 2, 6), (0, 6, 9), (1, 0, 4), (1, 4, 9)):
        alone = layer(x[row : row + 1, start:stop])
        assert_close(packed.y[row, start:stop], alone.y[0])
    after = sequence(length=3, seed=1)
    alone = layer(after[:1], layer(x[:1, 6:]).state).y
    assert_close(layer(after, packed.state).y[:1], alone)
    assert packed.y.isfinite().all()


def test_without_causality_it_is_permutation_equivariant():
    layer, x = build(EmlAttentionSpec(n_heads=2, causal=False)), sequence()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_close(layer(x[:, order]).y, layer(x).y[:, order])


@every_variant
def test_gradients_reach_every_parameter_and_huge_inputs_stay_finite(spec):
    layer = build(spec)
    for scale in (1.0, 1e6):
        layer.zero_grad()
        y = layer(scale * sequence()).y
        y.square().mean().backward()
        assert y.isfinite().all()
        for p in [p for p in layer.parameters() if p.numel()]:
            assert p.grad is not None
            assert p.grad.isfinite().all()
            assert scale > 1 or p.grad.abs().sum() > 0


@every_variant
def test_cost(spec):
    cost = spec.cost(LayerContext(D), seq_len=9, batch=2)
    layer = build(spec)
    assert cost.params == sum(p.numel() for p in layer.parameters())
    state = layer.float()(sequence().float()).state
    assert cost.state_bytes == sum(t.numel() * t.element_size() for t in state)


def test_registered_and_checked():
    assert MixerSpec.registry["eml_attention"] is EmlAttentionSpec
    model = ModelSpec(16, (BlockSpec(EmlAttentionSpec(n_heads=3)),), Tokens(11))
    with pytest.raises(SpecError, match="not divisible by 3 heads"):
        model.check()


def test_a_small_language_model_trains():
    spec = ModelSpec(16, (BlockSpec(EmlAttentionSpec(n_heads=2)),), Tokens(8))
    model = build_model(spec, seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, (16, 1), generator=generator) + torch.arange(12)
    tokens = tokens % 8
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
