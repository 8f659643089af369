"""Layers whose work the tokens decide: mixture of depths, and a stack that a summary conditions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.call import Call
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import ConditionSpec, DepthRoutedSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, BidirectionalSpec, MambaSpec
from kizzasi.train.leak import find_leak

D = 8
HEADS = BlockSpec(AttentionSpec(n_heads=2), MLPSpec(hidden=8))


def built(spec, seed=0):
    torch.manual_seed(seed)
    return spec.build(LayerContext(D), 1e-5, 0.0).double()


def stream(*shape, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).double()


def test_tokens_that_are_not_routed_pass_unchanged_and_unseen():
    layer, x = built(DepthRoutedSpec((HEADS,))), stream(2, 12)
    y, routed = layer(x).y, layer.router(x)[..., 0] > 0
    assert 0 < routed.sum() < routed.numel()
    assert torch.equal(y[~routed], x[~routed])
    assert (y[routed] != x[routed]).any(-1).all()
    other = torch.where(routed[..., None], x, x * 1.5)  # r keeps its sign
    assert torch.equal(layer(other).y[routed], y[routed])


def test_a_routed_token_takes_the_body_of_routed_ones_times_its_share():
    layer, x = built(DepthRoutedSpec((HEADS,))), stream(1, 12)
    r = layer.router(x)[0, :, 0]
    part = x[:, r > 0]
    ran = layer.body(part, None, Call.of(part)).x
    wanted = part + r[r > 0].sigmoid()[:, None] * (ran - part)
    torch.testing.assert_close(layer(x).y[:, r > 0], wanted, rtol=1e-12, atol=1e-12)


def test_the_routers_loss_draws_the_share_to_the_capacity():
    spec = DepthRoutedSpec((HEADS,), capacity=0.25, weight=1.0)
    layer, x = built(spec), stream(8, 64)
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.1)
    shares = []
    for _ in range(60):
        out = layer(x)
        optimizer.zero_grad()
        out.aux["depth_routed"].backward()
        optimizer.step()
        shares.append(float((layer.router(x) > 0).double().mean()))
    assert shares[0] > 0.4
    # w . x has no bias: it can draw few tokens, not exactly a quarter of any.
    assert shares[-1] < shares[0]


def test_one_router_decides_in_training_as_in_evaluation_and_shows_no_future():
    spec = ModelSpec(
        D, (HEADS, DepthRoutedSpec((HEADS, BlockSpec(MambaSpec(d_state=2))))), Tokens(9)
    )
    model = build_model(spec, seed=2, dtype=torch.float64)
    ids = torch.arange(24).view(2, 12) % 9
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    assert find_leak(model) is None


@pytest.mark.parametrize("op", ["film", "add", "scale", "lora"])
@pytest.mark.parametrize("at", ["in", "out", "stream", "norm", "q", "v"])
def test_a_conditioned_stack_starts_as_its_body_and_then_listens(op, at):
    spec = ConditionSpec((HEADS,), op=op, at=at, rank=2 if op == "lora" else None)
    layer, x = built(spec), stream(2, 10)
    plain = layer.body(x, None, Call.of(x)).x
    torch.testing.assert_close(layer(x).y, plain, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        (layer.turn if layer.up is None else layer.up).weight.normal_()
    torch.manual_seed(0)
    moved = x.clone()
    moved[:, 0] += 1  # the summary carries it to every later token, past a body that is causal
    changed = layer(moved).y[:, 1:] - layer(x).y[:, 1:]
    layer.norm.weight.data.zero_()  # a summary of nothing
    deaf = layer(moved).y[:, 1:] - layer(x).y[:, 1:]
    assert (changed - deaf).abs().amax((0, 2)).min() > 1e-6


def test_a_mean_is_of_the_document_alone():
    layer, x = built(ConditionSpec((HEADS,), op="add", at="stream")), stream(1, 6)
    starts = torch.tensor([[0, 0, 1, 1, 1, 2]])
    c, memory, seen, _ = layer._summary(x, None, Call.of(x, starts))
    torch.testing.assert_close(memory, x[:, 5])
    assert seen.tolist() == [1]
    wanted = layer.norm(x[:, 2:5].mean(1))
    torch.testing.assert_close(c[:, 4], wanted)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_segment_is_seen_once_it_has_ended(n):
    spec = ConditionSpec((HEADS,), op="add", at="stream", source="segment", segment=n)
    layer, x = built(spec), stream(2, 11)

    def wanted(tokens):
        ended = [tokens[:, i - n : i].mean(1) for i in range(n, tokens.shape[1], n)]
        means = [torch.zeros(2, D).double(), *(layer.norm(one) for one in ended)]
        return torch.stack([means[t // n] for t in range(tokens.shape[1])], 1)

    torch.testing.assert_close(layer._summary(x, None, Call.of(x))[0], wanted(x))
    first, rest = x[:, :5], x[:, 5:]  # one token more of the open document, then another
    state = layer(first, call=Call.of(first)).state
    segments = torch.tensor([[0] + [1] * 5]).expand(2, -1)
    c, _, seen, _ = layer._summary(rest, state, Call.of(rest, segments))
    torch.testing.assert_close(c[:, 0], wanted(x[:, :6])[:, 5])
    torch.testing.assert_close(c[:, 1:], wanted(x[:, 6:]))
    assert seen.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("at", "op", "groups"),
    [("norm", "film", 2), ("q", "scale", 2), ("v", "add", None), ("q", "lora", None)],
)
def test_norms_queries_and_values_are_turned_by_their_formulas(at, op, groups):
    rank = 3 if op == "lora" else None
    layer, x = built(ConditionSpec((HEADS,), op=op, at=at, groups=groups, rank=rank)), stream(2, 7)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    change, (block,) = layer.turn(layer._summary(x, None, Call.of(x))[0]), layer.body
    each = change if op == "lora" else change.repeat_interleave(D // (groups or D), -1)

    def turn(_, read, z):
        if op == "film":
            return (1 + each[..., :D]) * z + each[..., D:]
        if op == "lora":
            return z + layer.up(change * layer.down(read[0]))
        return z + each if op == "add" else (1 + each) * z

    parts = {
        "norm": (block.mixer_norm, block.channel_norm),
        "q": (block.mixer.q_proj,),
        "v": (block.mixer.v_proj,),
    }
    y = layer(x).y
    plain = block(x).y
    for part in parts[at]:
        part.register_forward_hook(turn)
    torch.testing.assert_close(y, block(x).y, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, plain)


def test_conditions_at_one_place_act_from_the_inside_out_and_on_every_layer():
    inner = ConditionSpec((HEADS, HEADS), op="scale", at="v")
    layer, x = built(ConditionSpec((inner,), op="add", at="v", hidden=3)), stream(1, 5)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    (within,) = layer.body
    c = [one._summary(x, None, Call.of(x))[0] for one in (within, layer)]
    s, a = within.turn(c[0]), layer.turn(F.silu(layer.hidden(c[1])))
    y = layer(x).y
    for block in within.body:
        block.mixer.v_proj.register_forward_hook(lambda _, read, z: (1 + s) * z + a)
    by_hand = within.body[1](within.body[0](x).y).y
    torch.testing.assert_close(y, by_hand, rtol=1e-12, atol=1e-12)


MIXES = BlockSpec(MambaSpec(d_state=2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DepthRoutedSpec((HEADS,), capacity=1.0), "capacity: 1.0 is outside"),
        (DepthRoutedSpec((HEADS,), weight=0.0), "weight: 0.0 is not positive"),
        (DepthRoutedSpec((BlockSpec(BidirectionalSpec(MambaSpec())),)), "later tokens"),
        (ConditionSpec((HEADS,), op="lora"), "rank: 'lora' needs a rank"),
        (ConditionSpec((HEADS,), rank=2), "rank: 'film' takes no rank"),
        (ConditionSpec((HEADS,), groups=3), "groups: 3 does not divide d_model 8"),
        (ConditionSpec((MIXES,), at="q"), "at: 'q': of the body's layers not all have that"),
        (ConditionSpec((HEADS, MIXES), at="v"), "at: 'v': of the body's layers not all"),
        (ConditionSpec((replace(HEADS, norm_at="post"),), at="norm"), "at: 'norm': of the body's"),
        (
            ConditionSpec((replace(HEADS, mixer=AttentionSpec(2, 1)),), at="v", groups=8),
            "groups: 8 does not divide the width of v 4",
        ),
        (ConditionSpec((HEADS,), source="segment"), "segment: 'segment' needs its tokens"),
        (ConditionSpec((HEADS,), segment=4), "segment: 'mean' has none"),
    ],
)
def test_what_does_not_fit_is_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(D, "")
