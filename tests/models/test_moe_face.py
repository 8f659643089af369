"""`MixtureOfExperts`, its config and its router: mixtures for networks of one's own."""

import copy
import json
import math
import warnings

import pytest
import torch
from tolerance import assert_close
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import MambaSpec
from kizzasi.models.moe import MixtureOfExperts, MoEConfig, Router, RoutingStrategy

# The compiler itself makes a Function while it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")


def config(**changes):
    return MoEConfig(**{"num_experts": 4, "input_dim": 12, "output_dim": 12, **changes})


def test_seed_defaults():
    seed = MoEConfig()
    assert (seed.num_experts, seed.top_k, seed.input_dim, seed.output_dim) == (8, 2, 256, 256)
    assert seed.routing_strategy is RoutingStrategy.TOP_K
    assert (seed.load_balance_coeff, seed.expert_dropout, seed.noise_std) == (0.01, 0.0, 1.0)
    assert [str(s) for s in RoutingStrategy] == ["Softmax", "Top-K", "Noisy Top-K"]
    assert MixtureOfExperts(seed).router.weights.shape == (256, 8)


@pytest.mark.parametrize(("strategy", "n"), [("TOP_K", 2), ("SOFTMAX", 4), ("NOISY_TOP_K", 2)])
def test_seed_routing(strategy, n):
    moe = MixtureOfExperts(config(routing_strategy=RoutingStrategy[strategy]))
    indices, weights = moe.router.route(torch.full((12,), 0.1))
    assert len(indices) == len(set(indices)) == len(weights) == n
    assert math.isclose(sum(weights), 1.0, abs_tol=1e-5)


def test_seed_usage_dimensions_and_reset():
    moe = MixtureOfExperts(config(output_dim=7))
    for _ in range(10):
        assert moe.step(torch.randn(12)).shape == (7,)
    assert sum(moe.expert_usage_stats()) == 10 * 2
    assert moe(torch.randn(3, 5, 12)).shape == (3, 5, 7)
    assert sum(moe.expert_usage_stats()) == 25 * 2
    assert moe.context_window == 1
    moe.reset()
    assert moe.expert_usage_stats() == [0] * 4
    for call in (moe, moe.step, moe.router.route):
        with pytest.raises(ShapeError, match=r"expected 12 values per vector, got shape \(6,\)"):
            call(torch.randn(6))


def test_seed_faults_are_gone():
    moe = MixtureOfExperts(config())
    x = torch.randn(64, 12)
    y = moe(x)
    assert y.abs().min(-1).values.max() > 0
    assert min(moe.expert_usage_stats()) > 0
    (gradient,) = torch.autograd.grad(moe.load_balance_loss(), [moe.layer.gate.weight])
    assert gradient.any()
    assert not torch.allclose(moe(2 * x), 2 * y)
    with pytest.raises(SpecError, match="top_k: 0 is not positive"):
        MixtureOfExperts(config(top_k=0))
    with pytest.raises(SpecError, match="experts: 1 given, num_experts is 4"):
        MixtureOfExperts(config(), [nn.Identity()])


@pytest.mark.parametrize("strategy", RoutingStrategy)
def test_seed_losses_are_weighted_by_the_coefficient(strategy):
    losses = []
    for coeff in (0.01, 0.03):
        torch.manual_seed(0)
        moe = MixtureOfExperts(config(routing_strategy=strategy, load_balance_coeff=coeff))
        moe(torch.randn(16, 12))
        losses.append(moe.load_balance_loss())
    assert_close(losses[1], 3 * losses[0])
    assert losses[0] > 0


def test_any_modules_are_experts():
    experts = [nn.Identity(), nn.Tanh(), nn.Sequential(nn.Linear(12, 12), nn.ReLU()), nn.ReLU()]
    moe = MixtureOfExperts(config(routing_strategy=RoutingStrategy.SOFTMAX), experts)
    x = torch.randn(5, 12)
    weights = (x @ moe.router.weights).softmax(-1)
    want = sum(weights[:, i, None] * expert(x) for i, expert in enumerate(experts))
    assert_close(moe(x), want)


@pytest.mark.parametrize("text", ["Softmax", "TopK", "Top-K", "Noisy Top-K", "NOISY_TOP_K"])
def test_a_strategy_may_be_given_by_its_text(text):
    read = config(routing_strategy=text)
    name = text.lower().replace("-", "").replace(" ", "").replace("_", "")
    assert str(read.routing_strategy).lower().replace("-", "").replace(" ", "") == name
    assert read.to_spec() == config(routing_strategy=RoutingStrategy(text)).to_spec()
    assert MoEConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read


def test_a_config_is_written_as_the_seeds_crate_writes_it():
    assert config().to_dict() == {
        **{"num_experts": 4, "top_k": 2, "input_dim": 12, "output_dim": 12},
        **{"routing_strategy": "TopK", "load_balance_coeff": 0.01},
        **{"expert_dropout": 0.0, "noise_std": 1.0},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing_strategy": "Switch"}, r"routing_strategy: 'Switch' is none of"),
        ({"routing_strategy": 1}, r"routing_strategy: 1 is none of"),
        ({"num_experts": "8"}, r"num_experts: expected int, got '8'"),
        ({"num_experts": 0}, r"num_experts: 0 is not positive"),
        ({"top_k": 5}, r"top_k: 5 is more than the 4 of num_experts"),
        ({"load_balance_coeff": -1.0}, r"load_balance_coeff: -1.0 is negative"),
        ({"expert_dropout": 1.0}, r"expert_dropout: 1.0 is outside"),
        ({"noise_std": 0.0, "routing_strategy": "NoisyTopK"}, r"noise_std: 0.0 is not positive"),
        ({"num_expert": 3}, r"num_expert: unknown; did you mean num_experts"),
    ],
)
def test_a_config_says_what_is_wrong_in_its_own_words(changes, message):
    with pytest.raises(SpecError, match=message):
        MixtureOfExperts(MoEConfig.from_dict({**config().to_dict(), **changes}))


def test_torchs_generator_or_ones_own_decides_the_weights():
    def weights(**options):
        return torch.cat([p.detach().flatten() for p in made(**options).parameters()])

    def made(**options):
        return MixtureOfExperts(config(), **options)

    torch.manual_seed(3)
    first, twin = weights(), weights()
    torch.manual_seed(3)
    assert torch.equal(weights(), first)
    assert not torch.equal(twin, first)
    a, b = (weights(generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(a, b)
    gates = [Router(config(), generator=torch.Generator().manual_seed(1)).weights for _ in "ab"]
    assert torch.equal(*gates)


class Attention(nn.Module):
    """Of all vectors to each other: an expert that is none."""

    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def test_sequence_mixers_see_each_vector_alone_and_modules_that_mix_are_refused():
    mixers = [MambaSpec(d_state=2).build(LayerContext(12)) for _ in range(4)]
    moe, x = MixtureOfExperts(config(), mixers), torch.randn(9, 12)
    assert_close(moe(x), torch.stack([moe(one) for one in x]))
    with pytest.raises(SpecError, match=r"experts\[1\]: Attention mixes the vectors"):
        MixtureOfExperts(config(), [nn.Identity(), Attention(), nn.Identity(), nn.Identity()])


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (nn.Linear(12, 20), r"experts\[2\]: Linear gives \(20,\) per vector, output_dim is 12"),
        (nn.Linear(20, 12), r"experts\[2\]: Linear does not take rows \(m, 12\)"),
        (nn.GRU(12, 12, batch_first=True), r"experts\[2\]: GRU made a tuple"),
    ],
)
def test_experts_that_do_not_fit_are_named(expert, message):
    experts = [nn.Identity(), nn.Identity(), expert, nn.Identity()]
    with pytest.raises(ShapeError, match=message):
        MixtureOfExperts(config(), iter(experts))
    with pytest.raises(SpecError, match=r"experts\[1\]: <.* is no module"):
        MixtureOfExperts(config(), [nn.Identity(), torch.sin, nn.Identity(), nn.Identity()])


def test_experts_keep_values_dtype_and_modes():
    experts = [nn.Sequential(nn.Linear(12, 12), nn.Dropout()).double() for _ in range(4)]
    experts[1].eval()
    before = [e[0].weight.clone() for e in experts]
    moe = MixtureOfExperts(config(), experts)
    assert [e.training for e in moe.layer.experts] == [True, False, True, True]
    assert all(map(torch.equal, before, (e[0].weight for e in moe.layer.experts)))


def test_steps_and_routes_are_those_of_evaluation_and_leave_training_alone():
    moe = MixtureOfExperts(config(routing_strategy="NoisyTopK", expert_dropout=0.5))
    moe.layer.experts[1].eval()
    x = torch.randn(12)
    moe(torch.randn(8, 12))
    steps = [moe.step(x) for _ in range(3)]
    assert torch.equal(steps[0], steps[1])
    assert moe.router.route(x) == moe.router.route(x)
    assert [e.training for e in moe.layer.experts] == [True, False, True, True]
    loss = moe.load_balance_loss()
    assert loss.requires_grad
    assert_close(steps[2], moe.eval()(x).detach())


def test_the_balance_loss_sums_over_forwards_and_is_handed_out_once():
    torch.manual_seed(0)
    moe, x = MixtureOfExperts(config(load_balance_coeff=1.0)), torch.randn(2, 8, 12)
    each = []
    for one in x:
        moe(one)
        each.append(moe.load_balance_loss())
    moe(x[0])
    moe(x[1])
    assert_close(moe.load_balance_loss(), each[0] + each[1])
    assert moe.load_balance_loss() == 0
    moe.eval()(x)
    assert moe.load_balance_loss() == 0


def test_losses_that_nobody_asks_for_are_forgotten_with_a_warning():
    moe, x = MixtureOfExperts(config()), torch.randn(4, 12)
    for _ in range(31):
        moe(x)
    with pytest.warns(UserWarning, match=r"32 forwards in training without load_balance_loss\(\)"):
        moe(x)
    assert moe.load_balance_loss() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            moe(x)
            moe.load_balance_loss()


def test_copies_and_averages_after_a_forward():
    moe, x = MixtureOfExperts(config()), torch.randn(6, 12)
    moe(x)
    twin, average = copy.deepcopy(moe), AveragedModel(moe)
    assert twin.load_balance_loss() == average.module.load_balance_loss() == 0
    assert moe.load_balance_loss().requires_grad
    assert twin.router.gate is twin.layer.gate is not moe.layer.gate
    assert_close(twin.eval()(x), moe.eval()(x))
    assert sum(twin.expert_usage_stats()) == 24
    assert sum(moe.expert_usage_stats()) == 24


@pytest.mark.parametrize("reentrant", [False, True])
def test_jobs_and_losses_are_counted_once_under_checkpointing(reentrant):
    moe = MixtureOfExperts(config(load_balance_coeff=1.0))
    x = torch.randn(10, 12, requires_grad=True)
    checkpoint(moe, x, use_reentrant=reentrant).sum().backward()
    assert sum(moe.expert_usage_stats()) == 20
    loss = moe.load_balance_loss()
    moe(x)
    assert_close(loss.detach(), moe.load_balance_loss().detach())


def test_a_router_by_itself():
    router = Router(MoEConfig(num_experts=4, top_k=2))
    assert router.weights.shape == (256, 4)
    indices, weights = router.route(torch.randn(256))
    assert len(set(indices)) == 2
    assert weights[0] >= weights[1]
    assert math.isclose(sum(weights), 1, abs_tol=1e-6)
    assert router.load_balance_loss([[0, 1], [2, 3]]) == 0
    assert math.isclose(router.load_balance_loss([[0], [0]]), 0.01 * math.sqrt(3))
    with pytest.raises(ShapeError, match=r"expected one vector, got shape \(2, 256\)"):
        router.route(torch.randn(2, 256))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 12, dtype=torch.int64), r"expected a floating tensor, got torch.int64"),
        (torch.ones(12).numpy(), r"expected a floating tensor, got ndarray"),
        (torch.ones(12).double(), r"torch.float64, but the router is torch.float32; use x.to"),
    ],
)
def test_inputs_that_are_no_vectors_of_the_mixture(x, message):
    with pytest.raises(ShapeError, match=message):
        MixtureOfExperts(config())(x)


@pytest.mark.parametrize("strategy", RoutingStrategy)
def test_vmap_grad_export_and_compile(strategy):
    moe, x = MixtureOfExperts(config(routing_strategy=strategy)), torch.randn(5, 12)
    moe.eval()
    want = moe(x)
    used = moe.expert_usage_stats()
    assert_close(torch.vmap(moe)(x), want)
    weights = dict(moe.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(moe, weights, (x,)).square().sum()

    given = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for name, p in moe.named_parameters():
        (wanted,) = torch.autograd.grad(loss(weights, x[:1]), p, allow_unused=True)
        if wanted is not None:
            assert_close(given[name][0], wanted)
    program = torch.export.export(moe, (x,))
    assert_close(program.module()(x), want)
    torch._dynamo.reset()
    before = sum(moe.expert_usage_stats())
    assert_close(torch.compile(moe, backend="eager", fullgraph=True)(x), want)
    assert sum(moe.expert_usage_stats()) == before + sum(used)


def test_training_under_compile_hands_out_the_loss():
    torch._dynamo.reset()
    moe, x = MixtureOfExperts(config(load_balance_coeff=1.0)), torch.randn(8, 12)
    call = torch.compile(moe, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        y, loss = call(x), moe.load_balance_loss()
        want, wanted = moe(x), moe.load_balance_loss()
        assert_close(y, want)
        assert_close(loss, wanted)
        for a, b in zip(
            *(
                torch.autograd.grad(v.sum() + w, list(moe.parameters()))
                for v, w in ((y, loss), (want, wanted))
            ),
            strict=True,
        ):
            assert_close(a, b)


def test_it_trains():
    torch.manual_seed(0)
    experts = [nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 12))]
    experts += [nn.Sequential(nn.Linear(12, 12), nn.Tanh()), nn.Identity()]
    moe = MixtureOfExperts(config(), experts)
    x, wanted = torch.randn(64, 12), torch.randn(64, 12)
    optimizer, losses = torch.optim.Adam(moe.parameters(), 1e-2), []
    for _ in range(100):
        loss = (moe(x) - wanted).square().mean()
        (loss + moe.load_balance_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert min(moe.expert_usage_stats()) > 0
