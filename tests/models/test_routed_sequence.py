"""A router of documents to mixers: its formula, loss, rows that run, and what the state carries."""

import pytest
import torch
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

import kizzasi.eml  # noqa: F401 (registers eml_attention)
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.call import Call
from kizzasi.models.mixer import LayerContext, MixerSpec
from kizzasi.models.mixers import (
    AttentionSpec,
    BidirectionalSpec,
    LongConvSpec,
    MambaSpec,
    RWKV7Spec,
    SequenceRoutedSpec,
)
from kizzasi.models.parts.gating import choose
from kizzasi.models.state import map_state, named_leaves

MAMBA, HEADS, EML = MambaSpec(d_state=3), AttentionSpec(2), MixerSpec.registry["eml_attention"]()
ALIBI = AttentionSpec(2, window=3, position="alibi")
MIXED = SequenceRoutedSpec((MAMBA, HEADS, EML))
FOUR = SequenceRoutedSpec((HEADS, MAMBA, ALIBI, RWKV7Spec(head_dim=4)), top_k=2, temperature=0.5)
every = pytest.mark.parametrize("spec", [MIXED, FOUR], ids=["top1", "top2"])


def build(spec=MIXED, d=8):
    layer = spec.build(LayerContext(d))
    layer.reset_parameters(1, torch.Generator().manual_seed(0))
    return layer.double()


def sequence(b=6, t=12, d=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, d, generator=generator, dtype=torch.float64)


def chosen_by(layer, first):
    """(..., n) bool of the first tokens (..., d)."""
    return choose(layer.spec, layer.gate, first)[1]


def fold(layer, x, state):
    ys = []
    for t in range(x.shape[1]):
        out = layer.step(x[:, t], state)
        ys.append(out.y)
        state = out.state
    return torch.stack(ys, 1), state


def watch(layer):
    """How many rows each mixer ran on, forward or step, since this was last cleared."""
    seen = {}
    for i, mixer in enumerate(layer.mixers):
        for name in ("forward", "step"):
            call = getattr(mixer, name)

            def spy(x, *args, _i=i, _call=call, **kwargs):
                seen[_i] = len(x)
                return _call(x, *args, **kwargs)

            setattr(mixer, name, spy)
    return seen


@every
def test_a_document_is_the_weighted_sum_of_its_mixers(spec):
    layer, x = build(spec), sequence()
    p = (x[:, 0] @ layer.gate.weight.mT / spec.temperature).softmax(-1)
    bar = p.sort(-1, descending=True).values[:, spec.top_k - 1 : spec.top_k]
    weights = torch.where(p >= bar, p, 0)
    assert (weights != 0).any(0).sum() > 1
    each = torch.stack([mixer(x).y for mixer in layer.mixers], -1)
    out = layer(x)
    assert_close(out.y, (each * weights[:, None, None]).sum(-1))
    assert_close(out.state.weights, weights)


@every
def test_a_mixer_runs_on_the_rows_that_chose_it_and_on_no_others(spec):
    layer, x = build(spec), sequence()
    chosen = chosen_by(layer, x[:, 0])
    seen = watch(layer)
    state = layer(x).state
    wanted = {i: n for i, n in enumerate(chosen.sum(0).tolist()) if n}
    assert seen == wanted
    assert sum(seen.values()) == len(x) * spec.top_k
    seen.clear()
    layer.step(x[:, 0], state)
    assert seen == wanted
    seen.clear()
    ids = torch.zeros(6, 12, dtype=torch.long)
    ids[:2, 7:] = 1  # two rows hold a second document
    ids[2] = -1  # one holds padding alone: every mixer leaves its memory as padding does
    layer(x, call=Call.of(x, ids))
    second = torch.zeros_like(chosen)
    second[:2] = chosen_by(layer, x[:2, 7])
    second[2] = True
    assert seen == {i: n for i, n in enumerate((chosen | second).sum(0).tolist()) if n}


@every
def test_step_and_splits_follow_the_first_token(spec):
    layer, x = build(spec), sequence(t=14)
    whole = layer(x)
    folded, state = fold(layer, x, layer.init_state(6, dtype=torch.float64))
    assert_close(folded, whole.y)
    first = layer(x[:, :5])
    second = layer(x[:, 5:], first.state)
    assert_close(torch.cat([first.y, second.y], 1), whole.y)
    for (name, a), (_, b) in zip(
        named_leaves(second.state), named_leaves(whole.state), strict=True
    ):
        assert_close(a.double(), b.double(), msg=name)
    assert_close(fold(layer, x[:, :3], state)[0], layer(x[:, :3], whole.state).y)


@every
def test_packed_documents_choose_for_themselves(spec):
    layer, lengths = build(spec), (5, 1, 6, 4)
    documents = [sequence(1, n, seed=n) for n in lengths]
    alone = [layer(document) for document in documents]
    ids = torch.tensor([7, 3, 9, 1]).repeat_interleave(torch.tensor(lengths))[None]
    packed = torch.cat(documents, 1)
    for cut in (3, 5, 6):
        begin, end = packed[:, :cut], packed[:, cut:]
        first = layer(begin, call=Call.of(begin, ids[:, :cut]))
        rest = ids[:, cut:] - ids[:, cut - 1]  # 0 goes on with the document
        second = layer(end, first.state, call=Call.of(end, rest + 100 * (rest < 0)))
        assert_close(torch.cat([first.y, second.y], 1), torch.cat([out.y for out in alone], 1))


@every
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_left_padding_that_ends_before_with_and_after_a_call(spec, cut):
    """With: nothing then marks the first token but the state."""
    model = build_model(ModelSpec(8, (BlockSpec(spec),) * 2, Tokens(11)), dtype=torch.float64)
    x = torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(8) >= torch.tensor([[0], [3], [0], [3], [6]])
    state = model(x[:, :cut], mask=mask[:, :cut]).state
    after = model(x[:, cut:], state, mask=mask[:, cut:])
    for row, start in enumerate((0, 3, 0, 3, 6)):
        wanted = model(x[row : row + 1, start:]).logits[0, max(0, cut - start) :]
        assert_close(after.logits[row, max(0, start - cut) :], wanted)
    if cut == 3:
        state = state.gather(torch.tensor([0, 1, 2, 3]))
        for t in range(3, 8):
            out = model.step(x[:4, t], state)
            state = out.state
            assert_close(out.logits, after.logits[:4, t - 3])


@every
def test_rows_forked_from_a_state_go_on(spec):
    layer, x = build(spec), sequence()
    order = torch.tensor([3, 0, 0, 5])
    forked = map_state(lambda leaf: leaf.index_select(0, order), layer(x).state)
    more = sequence(4, 5, seed=2)
    expected = layer(torch.cat([x[order], more], 1)).y[:, 12:]
    assert_close(layer(more, forked).y, expected)
    assert_close(fold(layer, more, forked)[0], expected)


@every
def test_a_traced_graph_runs_all_rows_to_the_same_end(spec, monkeypatch):
    """Its operations, one by one; that they make one graph is asked of every kind elsewhere."""
    layer, x = build(spec), sequence()
    state = layer(x[:, :5]).state
    expected = layer(x[:, 5:], state)
    seen = watch(layer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        actual = layer(x[:, 5:], state)
    assert seen == dict.fromkeys(range(len(spec.mixers)), 6)
    assert_close(actual.y, expected.y)
    leaves = dict(named_leaves(actual.state))
    idle = (expected.state.weights == 0).all(0)
    for name, leaf in named_leaves(expected.state):
        if not (name.split(".")[1] == "mixers" and idle[int(name.split(".")[2])]):
            assert_close(leaves[name].double(), leaf.double(), msg=name)
    more = sequence(6, 3, seed=2)
    assert_close(layer(more, actual.state).y, layer(more, expected.state).y)


def test_gradients_reach_the_gate_the_state_and_idle_mixers():
    layer, x = build(), sequence(1)
    chosen = chosen_by(layer, x[:, 0])[0].tolist()
    first = layer.eval()(x[:, :4])
    layer(x[:, 4:], first.state).y.sum().backward()
    assert layer.gate.weight.grad.abs().max() > 0
    for mixer, here in zip(layer.mixers, chosen, strict=True):
        for parameter in mixer.parameters():
            assert parameter.grad is not None
            assert here or not parameter.grad.any()
    state = map_state(
        lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), first.state
    )
    layer(x[:, 4:], state).y.sum().backward()
    grads = {name: leaf.grad for name, leaf in named_leaves(state) if leaf.requires_grad}
    assert None not in grads.values()
    assert grads["state.weights"].any()


def test_the_balance_loss_counts_every_document_once():
    layer, x = build(FOUR), sequence()
    p, chosen = choose(FOUR, layer.gate, x[:, 0])
    expected = 0.01 * 4 * ((chosen.double().mean(0) / 2) * p.mean(0)).sum()
    out = layer(x)
    assert_close(out.aux["sequence_routed_balance"], expected)
    (grad,) = torch.autograd.grad(out.aux["sequence_routed_balance"], layer.gate.weight)
    assert grad.abs().max() > 0
    again = layer(x, out.state).aux["sequence_routed_balance"]  # no document begins
    assert again == 0
    packed = torch.cat([sequence(1, 3, seed=5), x[:3].flatten(0, 1)[None]], 1)
    ids = torch.tensor([-1, 4, 5, 6]).repeat_interleave(torch.tensor([3, 12, 12, 12]))[None]
    given = layer(packed, call=Call.of(packed, ids)).aux["sequence_routed_balance"]
    assert_close(given, layer(x[:3]).aux["sequence_routed_balance"])
    assert layer.eval()(x).aux == {}


def test_the_loss_evens_out_the_choices():
    layer, x = build(SequenceRoutedSpec((MAMBA,) * 3, balance_weight=1.0)), sequence(64, 1) + 0.5
    with torch.no_grad():
        layer.gate.weight.mul_(0.1)
        layer.gate.weight[0] += 0.3
    before = chosen_by(layer, x[:, 0]).double().mean(0).max()
    optimizer = torch.optim.Adam([layer.gate.weight], lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        layer(x).aux["sequence_routed_balance"].backward()
        optimizer.step()
    after = chosen_by(layer, x[:, 0]).double().mean(0).max()
    assert before > 0.8
    assert after < 0.5


def test_the_mean_of_a_document_decides_and_nothing_streams():
    spec = SequenceRoutedSpec((MAMBA, HEADS, EML), 1, "mean")
    layer, documents = build(spec), [sequence(1, n, seed=n) for n in (5, 1, 6)]
    ids = torch.tensor([-1, 4, 5, 6]).repeat_interleave(torch.tensor([2, 5, 1, 6]))[None]
    x = torch.cat([sequence(1, 2), *documents], 1)
    packed = layer(x, call=Call.of(x, ids)).y[:, 2:]
    each = []
    for document in documents:
        p, chosen = choose(spec, layer.gate, document.mean(1))
        out, best = layer(document), int(chosen[0].long().argmax())
        assert_close(out.y, layer.mixers[best](document).y * p[0, best])
        assert out.state == layer.init_state(1) == ()
        each.append(out.y)
    assert_close(packed, torch.cat(each, 1))
    assert not spec.causal
    assert not SequenceRoutedSpec((BidirectionalSpec(MAMBA),)).causal
    with pytest.raises(SpecError, match=r'sequence_routed: .*use summary "first"'):
        layer.step(documents[0][:, 0], ())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_cost_is_exact_for_equal_mixers(top_k, device):
    spec = SequenceRoutedSpec((MAMBA,) * 3, top_k)
    layer, cost = build(spec).to(device), spec.cost(LayerContext(8), 12, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = layer(sequence().to(device))
    assert counter.get_total_flops() == cost.flops
    assert cost.params == sum(p.numel() for p in layer.parameters())
    assert cost.active_params == 8 * 3 + (cost.params - 8 * 3) * top_k // 3
    sizes = (
        leaf.numel() * (8 if leaf.dtype == torch.int64 else 4)
        for _, leaf in named_leaves(out.state)
    )
    assert cost.state_bytes == sum(sizes)


def test_what_a_mixer_computes_once_is_counted_where_it_works():
    one = LongConvSpec(max_len=16)
    spec, place = SequenceRoutedSpec((one,) * 3), LayerContext(8)
    alone, filters = one.cost(place, 12, 1).flops, one.cost(place, 12, 0).flops
    assert filters > 0
    assert spec.cost(place, 12, 1).flops == alone + 2 * 8 * 3
    assert spec.cost(place, 12, 6).flops == 3 * filters + 6 * (alone - filters) + 6 * 2 * 8 * 3


def test_mixers_stand_alone_among_layers_that_share():
    seven = RWKV7Spec(head_dim=4)
    blocks = tuple(BlockSpec(m) for m in (seven, SequenceRoutedSpec((seven, seven)), HEADS, seven))
    model = build_model(ModelSpec(8, blocks, Tokens(11)))
    names = dict(model.named_parameters())
    assert "blocks.3.mixer.v0" in names
    assert not any(".mixers." in name and name.endswith("v0") for name in names)
    assert model(torch.arange(22).view(2, 11) % 11).logits.isfinite().all()


def test_the_router_stays_in_float32():
    layer = build().float().to(torch.bfloat16)
    assert layer.gate.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(sequence().bfloat16())
    assert out.y.dtype == torch.bfloat16
    assert out.state.weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (SequenceRoutedSpec(()), r"mixer\.mixers: empty"),
        (
            SequenceRoutedSpec((MAMBA,), top_k=2),
            r"mixer\.top_k: 2 is not between 1 and the 1 there",
        ),
        (
            SequenceRoutedSpec((MAMBA,), temperature=0.0),
            r"mixer\.temperature: 0\.0 is not positive",
        ),
        (SequenceRoutedSpec((MAMBA,), balance_weight=-1.0), r"mixer\.balance_weight: -1\.0 is neg"),
        (SequenceRoutedSpec((MambaSpec(d_state=0),)), r"mixer\.mixers\[0\]\.d_state: 0 is not"),
    ],
)
def test_broken_rules_are_named(mixer, message):
    with pytest.raises(SpecError, match=message):
        build_model(ModelSpec(8, (BlockSpec(mixer),), Tokens(5)))
