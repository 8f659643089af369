"""The mixture-of-experts channel: contract, costs, losses, routers, refusals."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from tolerance import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.adaptive import PASSES_WITHOUT_A_STEP, after_step
from kizzasi.models.call import Call
from kizzasi.models.channels.moe import MoE, MoESpec
from kizzasi.models.channels.moe_routers import (
    ExpertChoice,
    Hash,
    NoisyTopK,
    Sinkhorn,
    Softmax,
    TopK,
)
from kizzasi.models.mixer import ChannelSpec, LayerContext
from kizzasi.models.mixers import AttentionSpec
from kizzasi.models.ops.routing import smooth_load

D = 24
ALL_LOSSES = {
    "balance_weight": 0.01,
    "sequence_weight": 0.02,
    "importance_weight": 0.03,
    "z_loss_weight": 0.04,
}
SWIGLU, MLP = ChannelSpec.registry["swiglu"], ChannelSpec.registry["mlp"]
SPECS = {
    "default": MoESpec(),
    "losses": MoESpec(**ALL_LOSSES, hidden=8),
    "switch": MoESpec(top_k=1, normalize="all"),
    "llama4": MoESpec(top_k=1, normalize="none", router=TopK(score="sigmoid"), shared_hidden=16),
    "aux_free": MoESpec(
        router=TopK(score="sigmoid", bias_rate=0.01, scale=2.5), balance_weight=0, z_loss_weight=0
    ),
    "groups": MoESpec(router=TopK(n_groups=4, top_groups=2, group_best=2), normalize="all"),
    "softmax": MoESpec(n_experts=3, top_k=3, router=Softmax(), importance_weight=0.1),
    "noisy": MoESpec(router=NoisyTopK(), load_weight=0.1, importance_weight=0.1),
    "sinkhorn": MoESpec(router=Sinkhorn()),
    "hash": MoESpec(router=Hash()),
    "expert_choice": MoESpec(router=ExpertChoice(), normalize="all"),
    "shared": MoESpec(shared_hidden=16, shared_gate=True),
    "null": MoESpec(n_experts=4, n_null=2, n_identity=2),
    "mixed": MoESpec(n_experts=3, experts=(SWIGLU(hidden=8), MLP(), SWIGLU(hidden=40))),
    "cost_aware": MoESpec(
        n_experts=2, top_k=2, experts=(SWIGLU(hidden=8), SWIGLU(hidden=16)), cost_aware=True
    ),
}


def make(spec: MoESpec, dtype=torch.float64, seed=0) -> MoE:
    spec.check(D, "moe")
    moe = spec.build(LayerContext(D))
    moe.reset_parameters(2, torch.Generator().manual_seed(seed))
    return moe.to(dtype)


def tokens(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", SPECS)
def test_cost_is_what_is_measured(name):
    spec = SPECS[name]
    moe = make(spec)
    cost = spec.cost(LayerContext(D), 12, 3)
    assert cost.params == sum(p.numel() for p in moe.parameters())
    assert cost.active_params <= cost.params
    if name in ("null", "mixed"):  # there the flops depend on the data
        return
    with FlopCounterMode(display=False) as counter:
        moe(tokens(3, 12))
    assert cost.flops == counter.get_total_flops()


def test_active_params_of_equal_experts():
    spec = MoESpec(n_experts=16, top_k=4, hidden=8)
    cost = spec.cost(LayerContext(D), 1, 1)
    assert cost.active_params == 16 * D + 4 * 3 * 8 * D


@pytest.mark.parametrize("name", SPECS)
def test_spec_survives_the_trip_through_json(name):
    spec = SPECS[name]
    assert ChannelSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("name", sorted(set(SPECS) - {"expert_choice"}))
def test_step_equals_forward_and_rows_are_independent(name):
    moe, x = make(SPECS[name]).eval(), tokens(3, 7)
    y = moe(x).y
    steps = torch.stack([moe.step(x[:, i], ()).y for i in range(7)], dim=1)
    assert_close(steps, y)
    assert_close(moe(x[1:2]).y, y[1:2])
    assert moe(x).aux == {}


@pytest.mark.parametrize("name", sorted(set(SPECS) - {"noisy"}))
def test_left_padding_changes_neither_results_nor_losses(name):
    moe, x = make(SPECS[name]), tokens(2, 9)
    pad = torch.cat([tokens(2, 4, seed=5), x], dim=1)
    segments = torch.zeros(2, 13, dtype=torch.int64)
    segments[:, :4] = -1
    plain, padded = moe(x), moe(pad, call=Call.of(pad, segments))
    assert_close(padded.y[:, 4:], plain.y)
    assert plain.aux.keys() == padded.aux.keys()
    for key, value in plain.aux.items():
        assert_close(padded.aux[key], value, msg=key)


@pytest.mark.parametrize("name", SPECS)
def test_every_trainable_parameter_gets_a_finite_gradient(name):
    torch.manual_seed(0)
    moe = make(SPECS[name])
    out = moe(tokens(2, 33))
    (out.y.square().sum() + sum(out.aux.values())).backward()
    for parameter_name, p in moe.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, parameter_name
            assert p.grad.isfinite().all(), parameter_name
    gate = getattr(moe.gate, "weight", None)
    assert gate is None or gate.grad.any()


@pytest.mark.parametrize("name", ["shared", "null", "groups", "expert_choice", "mixed"])
def test_layer_engines_agree(name):
    results = []
    for one in ("auto", "torch", "reference"):
        moe, x = make(SPECS[name]), tokens(2, 11).requires_grad_()
        moe.engine = one
        y = moe(x).y
        grads = torch.autograd.grad(y.cos().sum(), [x, *moe.experts.parameters()])
        results.append([y, *grads])
    for one in results[:2]:
        for got, want in zip(one, results[2], strict=True):
            assert_close(got, want)


def collapsed(name):
    """A router that sends everything to the first experts with certainty."""
    moe, x = make(SPECS[name]), tokens(2, 16)
    with torch.no_grad():
        x[..., 0] = 1.0
        moe.gate.weight.zero_()
        moe.gate.weight[:, 0] = -100.0 * torch.arange(moe.gate.choice.n_experts)
    return moe, x


@pytest.mark.parametrize("name", ["losses", "noisy", "aux_free", "softmax"])
@pytest.mark.parametrize("case", ["balanced", "collapsed"])
def test_losses_and_gradients_are_finite_at_both_ends(name, case):
    torch.manual_seed(0)
    if case == "collapsed":
        moe, x = collapsed(name)
    else:
        moe, x = make(SPECS[name]), tokens(2, 16)
        with torch.no_grad():
            moe.gate.weight.zero_()
    out = moe(x)
    (out.y.sum() + sum(out.aux.values())).backward()
    assert all(torch.isfinite(value) for value in out.aux.values())
    assert moe.gate.weight.grad.isfinite().all()


def test_switch_loss_is_1_at_balance_and_e_at_collapse():
    spec = MoESpec(n_experts=4, top_k=1, normalize="all", balance_weight=1.0, z_loss_weight=0)
    moe = make(spec)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[:, :4] = 50 * torch.eye(4)
    x = torch.zeros(1, 8, D, dtype=torch.float64)
    x[0, torch.arange(8), torch.arange(8) % 4] = 1
    assert_close(moe(x).aux["moe_balance"], torch.tensor(1.0, dtype=torch.float64))
    x[:] = x[0, 0]
    assert_close(moe(x).aux["moe_balance"], torch.tensor(4.0, dtype=torch.float64))


def test_losses_match_their_formulas():
    moe, x = make(SPECS["losses"]), tokens(3, 10)
    logits = x @ moe.gate.weight.T
    probs = logits.softmax(-1)
    top = probs.topk(2).indices
    hot = torch.nn.functional.one_hot(top, 8).sum(2).double()
    combine = probs * hot / (probs * hot).sum(-1, keepdim=True)
    importance = combine.sum((0, 1))
    aux = moe(x).aux
    assert_close(aux["moe_balance"], 0.01 * 8 * (hot.mean((0, 1)) / 2 * probs.mean((0, 1))).sum())
    each = 8 * (hot.mean(1) / 2 * probs.mean(1)).sum(-1)
    assert_close(aux["moe_sequence"], 0.02 * each.mean())
    cv2 = importance.var(unbiased=False) / importance.mean() ** 2
    assert_close(aux["moe_importance"], 0.03 * cv2)
    assert_close(aux["moe_z_loss"], 0.04 * logits.exp().sum(-1).log().square().mean())


def test_smooth_load_is_the_chance_of_being_chosen():
    torch.manual_seed(0)
    clean, std = torch.randn(1, 5).double(), torch.rand(1, 5).double() + 0.2
    noisy = clean + torch.randn(1, 5).double() * std
    load = smooth_load(clean, noisy, std, 2)
    for i in range(5):
        again = noisy.repeat(100_000, 1)
        again[:, i] = clean[0, i] + torch.randn(100_000).double() * std[0, i]
        chosen = (again.topk(2).indices == i).any(1).double().mean()
        assert abs(chosen - load[0, i]) < 0.01
    assert smooth_load(clean, noisy, std, 5).eq(1).all()


def test_noise_acts_in_training_only():
    torch.manual_seed(0)
    moe, x = make(SPECS["noisy"]), tokens(2, 8)
    assert not torch.equal(moe(x).y, moe(x).y)
    moe.eval()
    assert torch.equal(moe(x).y, moe(x).y)


@pytest.mark.parametrize("option", ["jitter", "expert_dropout"])
def test_training_noise_of_the_options(option):
    torch.manual_seed(0)
    moe, x = make(MoESpec(**{option: 0.3})), tokens(2, 8)
    quiet = make(MoESpec())
    assert not torch.equal(moe(x).y, quiet(x).y)
    assert_close(moe.eval()(x).y, quiet.eval()(x).y)


def test_groups_limit_the_choice():
    moe, x = make(SPECS["groups"]), tokens(2, 40)
    ids = moe.gate(x).to.expert.view(-1, 2)
    assert ((ids // 2).unique(dim=1).shape[1]) <= 2
    spec = MoESpec(top_k=2, router=TopK(n_groups=4, top_groups=1))
    ids = make(spec).gate(x).to.expert.view(-1, 2)
    assert (ids[:, 0] // 2 == ids[:, 1] // 2).all()


def test_sinkhorn_balances_in_training():
    moe, x = make(SPECS["sinkhorn"]), tokens(4, 64)
    with torch.no_grad():
        moe.gate.weight[0] += 1.0
        x += 0.5
    trained = torch.bincount(moe.gate(x).to.expert, minlength=8)
    plain = torch.bincount(moe.eval().gate(x).to.expert, minlength=8)
    assert trained.max() < 1.3 * 64 < plain.max()


def test_expert_choice_fills_every_seat_and_refuses_to_step():
    moe, x = make(SPECS["expert_choice"]), tokens(2, 16)
    assert torch.bincount(moe.gate(x).to.expert).eq(8).all()
    assert not moe.spec.causal
    assert moe.spec.context_window == math.inf
    with pytest.raises(SpecError, match="'expert_choice' compares all tokens"):
        moe.step(x[:, 0], ())


def test_hash_spreads_and_repeats():
    moe, x = make(SPECS["hash"]), tokens(8, 64)
    counts = torch.bincount(moe.gate(x).to.expert, minlength=8)
    assert counts.min() > 0.5 * counts.float().mean()
    assert torch.equal(moe.gate(x[:1]).to.expert, moe.gate(x[:1]).to.expert)


def test_capacity_serves_the_first_tokens_of_each_row():
    spec = MoESpec(n_experts=4, top_k=1, normalize="all", capacity_factor=1.0)
    moe = make(spec)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[2, 0] = 9.0
    x = tokens(2, 8)
    x[..., 0] = 1.0
    y = moe(x).y
    assert (y.abs().sum(-1) > 0).tolist() == [[True] * 2 + [False] * 6] * 2
    assert (moe.eval()(x).y.abs().sum(-1) > 0).all()


def test_identity_experts_return_their_input():
    moe, x = make(MoESpec(n_experts=1, top_k=3, n_identity=2)), tokens(1, 5)
    weights = (x @ moe.gate.weight.T).softmax(-1)
    gate, up, down = moe.experts.tensors(0)
    expert = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    y = weights[..., :1] * expert + weights[..., 1:].sum(-1, keepdim=True) * x
    assert_close(moe(x).y, y)


def train_bias(forward, batches):
    """One optimiser step over some micro-batches; returns the bias that follows."""
    moe = make(SPECS["aux_free"])
    optimizer = torch.optim.SGD(moe.parameters(), 0.1)
    for x in batches:
        forward(moe, x.requires_grad_()).sum().backward()
    optimizer.step()
    assert not moe.gate.bias.any()
    after_step(moe)
    bias = moe.gate.bias.clone()
    after_step(moe)  # nothing was counted since
    assert torch.equal(moe.gate.bias, bias)
    return bias


def test_bias_moves_once_per_step_with_accumulation_and_checkpointing():
    x = tokens(4, 32)
    plain = train_bias(lambda moe, x: moe(x).y, [x])
    assert plain.abs().max() > 0
    assert abs(plain.mean()) < 1e-12
    assert_close(train_bias(lambda moe, x: moe(x).y, list(x.split(1))), plain)
    for reentrant in (False, True):

        def run(moe, x, reentrant=reentrant):
            return checkpoint(lambda v: moe(v).y, x, use_reentrant=reentrant)

        assert_close(train_bias(run, [x]), plain)


def test_bias_steers_the_choice_towards_idle_experts():
    moe, x = make(SPECS["aux_free"]), tokens(4, 64) + 0.5
    with torch.no_grad():
        moe.gate.weight[0] += 0.5
    optimizer = torch.optim.SGD(moe.parameters(), 0.0)
    before = torch.bincount(moe.gate(x).to.expert, minlength=8).max()
    for _ in range(60):
        moe(x).y.sum().backward()
        optimizer.step()
        after_step(moe)
    after = torch.bincount(moe.gate(x).to.expert, minlength=8).max()
    assert after < 0.6 * before


def test_router_is_float32_in_bfloat16_models_and_under_autocast():
    moe = make(SPECS["aux_free"], torch.float32).to(torch.bfloat16)
    assert moe.gate.weight.dtype == moe.gate.bias.dtype == torch.float32
    assert moe.experts.gate_up_proj.dtype == torch.bfloat16
    x = tokens(2, 8, dtype=torch.bfloat16)
    assert moe(x).y.dtype == torch.bfloat16
    moe = make(SPECS["default"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        routing = moe.gate(tokens(2, 8, dtype=torch.float32))
    assert routing.logits.dtype == torch.float32


def test_a_bias_that_nobody_moves_warns_once():
    moe, x = make(SPECS["aux_free"], torch.float32), tokens(1, 4, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2 * PASSES_WITHOUT_A_STEP):
            moe(x)
    assert len(caught) == 1
    assert "no model.after_step()" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * PASSES_WITHOUT_A_STEP):
            moe(x)
            after_step(moe)


def test_hooks_and_parametrizations_of_packed_experts_act():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    moe, x, called = make(SPECS["default"]), tokens(2, 8), []
    want = moe(x).y
    moe.experts.register_forward_hook(lambda *_: called.append(1))
    torch.nn.utils.parametrize.register_parametrization(moe.experts, "down_proj", Doubled())
    assert_close(moe(x).y, 2 * want)
    moe.eval().step(x[:, 0], ())
    assert called == [1, 1]


def test_in_a_model_losses_reach_the_model_loss():
    block = BlockSpec(mixer=AttentionSpec(n_heads=2), channel=MoESpec())
    spec = ModelSpec(16, (block, block), Tokens(11))
    model = build_model(spec, dtype=torch.float64)
    ids = torch.randint(0, 11, (2, 6))
    out = model(ids)
    assert set(out.aux) == {"moe_balance", "moe_z_loss"}
    assert out.loss(ids) > out._replace(aux={}).loss(ids)
    assert model.eval()(ids).aux == {}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("training", [False, True])
def test_torch_func_grad_and_vmap(name, training):
    """Gradients row by row; what counts (a bias's tally) stays out of transforms."""
    spec = replace(SPECS[name], balance_weight=0.0, z_loss_weight=0.0)
    moe, x = make(spec).train(training), tokens(3, 5)
    weights = {n: p for n, p in moe.named_parameters() if p.requires_grad}

    def loss(weights, row):
        torch.manual_seed(0)
        return torch.func.functional_call(moe, weights, (row[None],)).y.cos().sum()

    given = torch.func.grad(loss)(weights, x[1])
    leaves = list(weights.values())
    wanted = torch.autograd.grad(loss(weights, x[1]), leaves, materialize_grads=True)
    for a, b in zip(given.values(), wanted, strict=True):
        assert_close(a, b)
    if training and name == "noisy":
        return  # vmap wants to be told which rows share their noise
    rows = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for a, b in zip(rows.values(), wanted, strict=True):
        assert_close(a[1], b)


LIMITED = MoESpec(n_experts=4, top_k=1, normalize="all", capacity_factor=0.8)


@pytest.mark.parametrize("spec", [SPECS["expert_choice"], LIMITED])
def test_seats_are_those_of_documents(spec):
    """Each has its own, whatever stands beside it in a row; padding takes none."""
    moe, lengths = make(spec), (5, 1, 9, 3)
    documents = [tokens(1, n, seed=n) for n in lengths]
    packed = torch.cat([tokens(1, 4, seed=7), *documents], 1)
    ids = torch.repeat_interleave(torch.tensor([-1, 0, 1, 2, 3]), torch.tensor([4, *lengths]))[None]
    y = moe(packed, call=Call.of(packed, ids)).y
    assert not y[:, :4].any()
    assert_close(y[:, 4:], torch.cat([moe(one).y for one in documents], 1))


@pytest.mark.parametrize("name", ["default", "losses", "mixed"])
def test_second_derivatives_of_a_layer(name):
    """Through the router too, whose weights depend on the same tokens."""
    results = []
    for engine in ("auto", "reference"):
        moe, x = make(SPECS[name]), tokens(1, 6).requires_grad_()
        moe.engine = engine
        (grad,) = torch.autograd.grad(moe(x).y.cos().sum(), x, create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), [x, *moe.parameters()])])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
