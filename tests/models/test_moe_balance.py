"""A toy task on which routing without balancing collapses, and balanced routing does not.

A hash learns no routing, so it cannot do the toy better than an unbalanced router does: what it is
held to is its balance, which needs no training. Expert choice is held to both with two seats per
token, against an unbalanced top 2. With one seat it is as balanced, but leaves tokens unserved in
rows that have more of one kind than of another, as the toy's have; so one test asks for just that.
"""

from functools import cache

import pytest
import torch

from kizzasi.models.call import Call
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import ExpertChoice, Hash, NoisyTopK, Sinkhorn, TopK
from kizzasi.models.mixer import LayerContext
from kizzasi.models.moe import after_every_step, after_step, balance_hashes, watch_routing

QUIET = {"hidden": 16, "z_loss_weight": 0.0, "balance_weight": 0.0}
NOISY = {"importance_weight": 0.5, "load_weight": 0.5, "router": NoisyTopK()}
BALANCED = {
    "switch": MoESpec(**{**QUIET, "balance_weight": 0.5}, top_k=1, normalize="all"),
    "aux_free": MoESpec(
        **QUIET, top_k=1, normalize="none", router=TopK(score="sigmoid", bias_rate=0.005)
    ),
    "noisy": MoESpec(**QUIET, **NOISY, top_k=1, normalize="all"),
    "sinkhorn": MoESpec(**QUIET, top_k=1, normalize="all", router=Sinkhorn()),
    "expert_choice": MoESpec(**QUIET, top_k=2, normalize="all", router=ExpertChoice()),
}
LR = 0.01
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def toy_batch(seed, n_rows, generator):
    """Eight clusters off the origin, each with its own linear map to learn."""
    fixed = torch.Generator().manual_seed(1000 + seed)
    centres, maps = torch.randn(8, 16, generator=fixed), torch.randn(8, 16, 16, generator=fixed) / 4
    cluster = torch.randint(0, 8, (n_rows, 256), generator=generator)
    x = centres[cluster] + 0.5 * torch.randn(n_rows, 256, 16, generator=generator)
    return x + 0.7, torch.einsum("btd,btde->bte", x, maps[cluster])


def build(spec, generator):
    moe = spec.build(LayerContext(16))
    moe.reset_parameters(1, generator)
    return moe


def violation(moe, x):
    with watch_routing(moe.eval()) as usage, torch.no_grad():
        moe(x)
    return usage[""].max_violation


@cache
def toy_data(seed):
    """180 batches to train on, and fresh data."""
    generator = torch.Generator().manual_seed(seed)
    return [toy_batch(seed, 1, generator) for _ in range(180)], toy_batch(seed, 16, generator)


@cache
def toy_run(spec, seed):
    """Train; returns the loss and the max violation on fresh data."""
    torch.manual_seed(seed)
    moe = build(spec, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(moe.parameters(), LR, fused=True)
    after_every_step(optimizer, moe)
    batches, (fresh, wanted) = toy_data(seed)
    for x, y in batches:
        out = moe(x)
        ((out.y - y).square().mean() + sum(out.aux.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    over = violation(moe, fresh)
    with torch.no_grad():
        return float((moe(fresh).y - wanted).square().mean()), over


@seeds
@pytest.mark.parametrize("name", BALANCED)
def test_unbalanced_routing_collapses_and_balanced_routing_does_not(name, seed):
    spec = BALANCED[name]
    collapsed_loss, over = toy_run(MoESpec(**QUIET, top_k=spec.top_k, normalize="all"), seed)
    assert over > 1.5
    loss, over = toy_run(spec, seed)
    assert over < 0.3
    assert loss <= collapsed_loss


@seeds
def test_a_hash_is_balanced_once_its_codes_are_dealt_out_by_frequency(seed):
    generator = torch.Generator().manual_seed(seed)
    moe = build(MoESpec(**QUIET, top_k=1, router=Hash()), generator)
    sample, fresh = (toy_batch(seed, 16, generator)[0] for _ in "ab")
    assert violation(moe, fresh) > 0.3
    balance_hashes(moe, lambda: moe(sample))
    assert violation(moe, sample) < 0.1
    assert violation(moe, fresh) < 0.3
    again = build(moe.spec, generator)
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again(fresh).y, moe(fresh).y)


def test_a_hash_is_dealt_out_by_real_tokens_alone():
    generator = torch.Generator().manual_seed(0)
    moe, same = (build(MoESpec(router=Hash()), torch.Generator().manual_seed(0)) for _ in "ab")
    x = torch.randn(2, 40, 16, generator=generator)
    ids = torch.where(torch.arange(40) < 15, -1, 0).expand(2, -1)
    balance_hashes(moe, lambda: moe(x, call=Call.of(x, ids)))
    same.spec.router.balance(same.gate, x[:, 15:])
    assert torch.equal(moe.gate.table, same.gate.table)


@seeds
def test_expert_choice_with_one_seat_per_token_is_balanced_and_leaves_some_unserved(seed):
    generator = torch.Generator().manual_seed(seed)
    for top_k, unserved in ((1, True), (8, False)):
        spec = MoESpec(**QUIET, top_k=top_k, normalize="all", router=ExpertChoice())
        moe, (x, _) = build(spec, generator), toy_batch(seed, 4, generator)
        assert violation(moe, x) == 0
        served = moe.gate(x).to.token.unique()
        assert (len(served) < x[..., 0].numel()) == unserved
        alone = torch.ones(x[..., 0].numel(), dtype=torch.bool).scatter(0, served, False)
        assert not moe(x).y.flatten(0, 1)[alone].any()


def test_a_cold_plan_is_balanced_in_its_choices_and_evaluation_follows_it():
    """Both plans give every expert the same total; only the cold one's largest parts are even."""
    for temperature, even in ((1.0, False), (0.3, True)):
        spec = MoESpec(**QUIET, top_k=1, normalize="all", router=Sinkhorn(temperature=temperature))
        generator = torch.Generator().manual_seed(0)
        moe, (x, y) = build(spec, generator), toy_batch(0, 16, generator)
        skew = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, -1.0])
        with torch.no_grad():
            moe.gate.weight.add_(skew[:, None] / 8)
        planned = moe.gate(x).to.expert
        assert (torch.bincount(planned, minlength=8).max() / 512 < 1.3) == even
        assert not torch.equal(planned, moe.eval().gate(x).to.expert)
        moe.train()(x).y.sub(y).square().mean().backward()
        after_step(moe)
        agree = (moe.eval().gate(x).to.expert == planned).float().mean()
        assert agree > 0.99


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("router", [TopK(bias_rate=0.1), Sinkhorn(bias_rate=0.1)], ids=str)
def test_the_bias_moves_once_per_step_of_any_optimizer(router, how):
    moe = build(MoESpec(router=router, n_experts=4, hidden=8), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(moe.parameters(), 1e-3, **how)
    handle = after_every_step(optimizer, moe)
    x, _ = toy_batch(0, 1, torch.Generator().manual_seed(0))
    bias = [moe.gate.bias.clone()]
    for _ in range(3):
        for _ in range(2):  # batches that are accumulated
            moe(x).y.square().mean().backward()
        assert torch.equal(moe.gate.bias, bias[-1])
        optimizer.step()
        assert not torch.equal(moe.gate.bias, bias[-1])
        bias.append(moe.gate.bias.clone())
    handle.remove()
    moe(x).y.sum().backward()
    optimizer.step()
    assert torch.equal(moe.gate.bias, bias[-1])
