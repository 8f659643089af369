"""`model.recompute`: the same gradients from less memory, for every kind, with chance, counts."""

import pytest
import torch
from cases import every_kind, make, tokens
from tolerance import assert_close

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MoESpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec
from kizzasi.models.moe import watch_routing


def train(model, x, seed=3):
    """Gradients and loss of one pass, under a given chance."""
    torch.manual_seed(seed)
    model.zero_grad()
    first = model(x[:, :4])
    loss = first.loss(x[:, :4])
    if model.spec.causal:  # gradients through the state too
        loss = loss + model(x[:, 4:], first.state).loss(x[:, 4:])
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_training(model, x):
    outcomes = []
    for model.recompute in (False, True):
        outcomes.append(train(model, x))
    (loss, wanted), (again, given) = outcomes
    assert_close(again, loss)
    for a, b in zip(given, wanted, strict=True):
        assert_close(a, b)


@every_kind
def test_gradients_are_the_same(name):
    assert_same_training(make(name), tokens(2, 9))


def test_dropout_is_drawn_once():
    spec = ModelSpec(16, (BlockSpec(RWKV7Spec(head_dim=8)),) * 3, Tokens(23), dropout=0.5)
    model, x = build_model(spec, dtype=torch.float64), tokens(2, 9)
    assert_same_training(model, x)
    same, other = train(model, x)[1], train(model, x, seed=4)[1]
    assert not all(map(torch.equal, same, other))


def test_a_mixture_counts_its_jobs_once_and_moves_its_bias_alike():
    channel = {"n_experts": 4, "top_k": 2, "jitter": 0.1, "balance_weight": 0.1}
    channel["router"] = {"kind": "top_k", "score": "sigmoid", "bias_rate": 0.1}
    block = BlockSpec(AttentionSpec(n_heads=2), MoESpec.from_dict(channel))
    spec, x, seen = ModelSpec(16, (block,) * 2, Tokens(23)), tokens(2, 9), []
    for recompute in (False, True):
        model = build_model(spec, dtype=torch.float64)
        model.recompute = recompute
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch_routing(model) as usage:
            for seed in range(3):
                loss, _ = train(model, x, seed)
                optimizer.step()
        counts = [layer.counts for layer in usage.layers().values()]
        assert counts[0].sum() == 3 * x.numel() * 2
        seen.append([loss, *counts, *model.state_dict().values()])
    for plain, recomputed in zip(*seen, strict=True):
        assert_close(recomputed.double(), plain.double())


def test_without_gradients_nothing_changes():
    model, x = make("mamba-small"), tokens(2, 9)
    model.recompute = True
    with torch.no_grad():
        assert not model(x).logits.requires_grad


@pytest.mark.parametrize("mixer", [MambaSpec(d_state=4), AttentionSpec(n_heads=2)])
def test_what_is_kept_for_backward_shrinks_to_the_inputs_of_the_blocks(mixer):
    n_layers, x = 6, tokens(2, 64)
    model = build_model(ModelSpec(16, (BlockSpec(mixer),) * n_layers, Tokens(23)))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    n_bytes = []
    for model.recompute in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        n_bytes.append(sum(kept.values()))
        del out
    print(f"{type(mixer).__name__}: {n_bytes[0]:,} -> {n_bytes[1]:,} bytes")
    assert n_bytes[1] < n_bytes[0] / 4
