"""A router over mixers: its formula, ties, loss, and which experts run on which tokens."""

import pytest
import torch
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.call import Call
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.routed import RoutedSpec
from kizzasi.models.parts.gating import choose

MAMBA, HEADS, MLP = MambaSpec(d_state=4), AttentionSpec(n_heads=2), MLPSpec(hidden=6)
MIXED = RoutedSpec((MAMBA, HEADS), (MLP, MLP), top_k=2, temperature=0.5)


def build(spec=MIXED, d=8):
    layer = spec.build(LayerContext(d))
    layer.reset_parameters(1, torch.Generator().manual_seed(0))
    return layer.double()


def sequence(t=12, d=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, t, d, generator=generator, dtype=torch.float64)


def choices(layer, x):
    return choose(layer.spec, layer.gate, x)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_chosen_are_weighted_by_their_probability(top_k):
    layer, x = build(RoutedSpec((MAMBA, HEADS), (MLP, MLP), top_k, temperature=0.5)), sequence()
    p = (x @ layer.gate.weight.mT / 0.5).softmax(-1)
    bar = p.sort(-1, descending=True).values[..., top_k - 1 : top_k]
    weights = torch.where(p >= bar, p, 0)
    each = torch.stack([m(x).y for m in (*layer.mixers, *layer.channels)], -1)
    assert_close(layer(x).y, (each * weights[..., None, :]).sum(-1))


def test_sequence_mixers_see_every_token_and_channels_those_that_chose_them():
    layer, x, seen = build(), sequence(), []
    for expert in (*layer.mixers, *layer.channels):
        expert.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    _, chosen = choices(layer, x)
    ids = torch.zeros(2, 12, dtype=torch.long)
    ids[0, :5] = -1
    layer(x, call=Call.of(x, ids))
    n = chosen[ids >= 0].sum(0).tolist()
    assert seen == [(2, 12), (2, 12), (1, n[2]), (1, n[3])]
    assert layer.spec.sparse == (False, False, True, True)
    assert "every token: ['mamba', 'attention'], chosen tokens: ['mlp', 'mlp']" in repr(layer)


def test_a_mixer_that_nobody_chose_keeps_its_memory():
    layer, x = build(RoutedSpec((MAMBA, HEADS))), sequence()
    with torch.no_grad():
        layer.gate.weight.zero_()  # a tie: the first wins
    assert choices(layer, x)[1][..., 0].all()
    out = layer(x)
    assert_close(out.y, layer.mixers[0](x).y / 2)
    assert_close(out.state[1].k, layer.mixers[1](x).state.k)


def test_ties_go_to_the_first_listed():
    layer = build(RoutedSpec((MAMBA,) * 5, top_k=2))
    with torch.no_grad():
        layer.gate.weight.zero_()
    _, chosen = choices(layer, sequence())
    assert chosen.long().flatten(0, 1).unique(dim=0).tolist() == [[1, 1, 0, 0, 0]]


@pytest.mark.parametrize("length", [1, 7, 20])
def test_sparse_experts_step_and_split_like_one_call(length):
    spec = ModelSpec(8, (BlockSpec(MIXED),) * 2, Tokens(11))
    model = build_model(spec, dtype=torch.float64)
    ids = torch.randint(11, (2, length), generator=torch.Generator().manual_seed(3))
    whole, state, parts = model(ids), model.init_state(2), []
    for t in range(length):
        out = model.step(ids[:, t], state)
        state = out.state
        parts.append(out.logits)
    assert_close(torch.stack(parts, 1), whole.logits)
    first = model(ids[:, : length // 2 + 1])
    if length > 2:
        second = model(ids[:, length // 2 + 1 :], first.state)
        assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
    whole.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_balance_loss_is_switch_loss_over_real_tokens_in_training():
    layer, x = build(), sequence()
    p, chosen = choices(layer, x)
    expected = 0.01 * 4 * ((chosen.double().mean((0, 1)) / 2) * p.mean((0, 1))).sum()
    loss = layer(x).aux["routed_balance"]
    assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, layer.gate.weight)
    assert grad.abs().max() > 0
    ids = torch.zeros(2, 12, dtype=torch.long)
    ids[:, :5] = -1
    padded = layer(x, call=Call.of(x, ids)).aux["routed_balance"]
    assert_close(padded, layer(x[:, 5:]).aux["routed_balance"])
    assert layer.eval()(x).aux == {}
    assert build(RoutedSpec((MAMBA, HEADS), balance_weight=0.0))(x).aux == {}


def test_the_loss_evens_out_the_choices():
    layer, x = build(RoutedSpec((MAMBA,), (MLP, MLP), balance_weight=1.0)), sequence(t=64)
    with torch.no_grad():
        layer.gate.weight.mul_(0.1)
        layer.gate.weight[0] += 0.3
    x = x + 0.5
    before = choices(layer, x)[1].double().mean((0, 1)).max()
    optimizer = torch.optim.Adam([layer.gate.weight], lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        layer(x).aux["routed_balance"].backward()
        optimizer.step()
    after = choices(layer, x)[1].double().mean((0, 1)).max()
    assert before > 0.8
    assert after < 0.5


def test_the_router_stays_in_float32():
    layer = build().float().to(torch.bfloat16)
    assert layer.gate.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probs, _ = choices(layer, sequence().bfloat16())
    assert probs.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2])
def test_flops_of_equal_sparse_experts_are_exact(top_k):
    spec = RoutedSpec((), (MLP, MLP, MLP), top_k)
    layer, cost = build(spec), spec.cost(LayerContext(8), 12, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(sequence())
    assert counter.get_total_flops() == cost.flops
    assert cost.params == sum(p.numel() for p in layer.parameters())
    assert cost.active_params == 8 * 3 + (cost.params - 8 * 3) * top_k // 3


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (RoutedSpec(()), r"mixer\.mixers: empty"),
        (RoutedSpec((MAMBA,), top_k=2), r"mixer\.top_k: 2 is not between 1 and the 1 there"),
        (RoutedSpec((MAMBA,), top_k=0), r"mixer\.top_k: 0 is not between"),
        (RoutedSpec((MAMBA,), temperature=0.0), r"mixer\.temperature: 0\.0 is not positive"),
        (RoutedSpec((MAMBA,), balance_weight=-1.0), r"mixer\.balance_weight: -1\.0 is negative"),
        (RoutedSpec((MAMBA,), (MoESpec(),)), r"mixer\.channels\[0\]: 'moe' "),
        (RoutedSpec((MAMBA,), (RWKVChannelSpec(),)), r"mixer\.channels\[0\]: 'rwkv_channel' looks"),
        (RoutedSpec((MambaSpec(d_state=0),)), r"mixer\.mixers\[0\]\.d_state: 0 is not positive"),
        (RoutedSpec((), (MLPSpec(hidden=0),)), r"mixer\.channels\[0\]\.hidden: 0 is not"),
    ],
)
def test_broken_rules_are_named(mixer, message):
    with pytest.raises(SpecError, match=message):
        build_model(ModelSpec(8, (BlockSpec(mixer),), Tokens(5)))
