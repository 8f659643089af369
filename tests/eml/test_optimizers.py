"""Gradient-free optimisers: they descend, repeat themselves, resume, and ignore the batch size."""

import io

import pytest
import torch
from tolerance import assert_close
from torch import nn

from kizzasi.eml.attention import EmlAttentionSpec
from kizzasi.eml.search.coordinate import BlockDescent, CoordinateDescent
from kizzasi.eml.search.evolution import AntitheticES, SeparableCma, Spsa
from kizzasi.eml.search.gauss_newton import GaussNewton
from kizzasi.eml.search.minimize import minimize
from kizzasi.eml.search.objective import ModuleObjective
from kizzasi.eml.search.optimizer import hashed_normal, hashed_uniform
from kizzasi.eml.search.pattern import PatternSearch
from kizzasi.eml.search.rows import output_rows
from kizzasi.eml.tasks import draw, identity, position_mean, r_squared
from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext

OPTIMIZERS = [
    CoordinateDescent(1500),
    CoordinateDescent(1500, block=2),
    BlockDescent(1),
    BlockDescent(6),
    PatternSearch(),
    AntitheticES(population=16, steps=200),
    Spsa(pairs=4, lr=0.02, adam=True),
    Spsa(lr=2e-3),
    SeparableCma(),
]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)


def valley(points):
    """A curved, badly scaled bowl with its minimum 0 at 1."""
    a, b = points[..., :-1], points[..., 1:]
    return ((1 - a).square() + 10 * (b - a.square()).square()).sum(-1)


def flat_loss(points):
    return torch.zeros(points.shape[:2], dtype=torch.float64)


def start(problems=2):
    return torch.zeros(problems, 6, dtype=torch.float64)


@every_optimizer
def test_descends_and_reports_its_best(optimizer):
    result = minimize(valley, optimizer, start(), evaluations=1500, seed=1)
    assert (result.loss < 0.5 * valley(start())).all()
    assert_close(valley(result.x), result.loss)
    losses = [loss for _, loss in result.history]
    assert losses == sorted(losses, reverse=True)


@every_optimizer
def test_resuming_from_disk_changes_nothing(optimizer):
    whole = minimize(valley, optimizer, start(), evaluations=600, seed=2)
    part = minimize(valley, optimizer, start(), evaluations=300, seed=2)
    buffer = io.BytesIO()
    torch.save(part, buffer)
    buffer.seek(0)
    part = torch.load(buffer, weights_only=False)
    resumed = minimize(valley, optimizer, start(), evaluations=600, seed=2, resume=part)
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.loss, whole.loss)
    assert resumed.evaluations == whole.evaluations
    assert optimizer.speculative or resumed.history == whole.history


@every_optimizer
def test_problems_are_independent_of_bad_losses(optimizer):
    def poisoned(points):
        losses = valley(points).clone()
        losses[0, ::2] = torch.nan
        return losses

    clean = minimize(valley, optimizer, start(), evaluations=200, seed=3)
    result = minimize(poisoned, optimizer, start(), evaluations=200, seed=3)
    assert result.x.isfinite().all()
    assert torch.equal(result.x[1], clean.x[1])


@pytest.mark.parametrize("batch", [1, 7, 64, None])
@pytest.mark.parametrize("block", [1, 3])
def test_speculative_descent_is_sequential(batch, block):
    """Against a loop that tries one candidate at a time."""
    trials = 400
    one = CoordinateDescent(trials, block=block, batch=1)
    state = one.init(start(), valley(start()), seed=5, evaluations=trials)
    for _ in range(trials):
        candidates = one.ask(state)
        state = one.tell(state, candidates, valley(candidates))
    optimizer = CoordinateDescent(trials, block=block, batch=batch)
    result = minimize(valley, optimizer, start(), evaluations=10**6, seed=5)
    assert torch.equal(result.x, state.x)
    assert torch.equal(result.state.accepts, state.accepts)
    assert (result.state.trial == trials).all()
    assert result.evaluations == trials + 1
    assert result.asked >= result.evaluations
    assert state.accepts.min() > 20


def test_early_stop():
    optimizer = SeparableCma()
    target = minimize(valley, optimizer, start(), evaluations=10**5, target=0.1)
    assert (target.loss <= 0.1).all()
    assert target.evaluations < 10**4
    flat = minimize(flat_loss, optimizer, start(), evaluations=10**5, patience=5)
    assert len(flat.history) == 6


def test_hashed_numbers():
    keys = torch.arange(20_000)
    uniform, normal = hashed_uniform(1, keys), hashed_normal(1, keys)
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(float(uniform.mean()) - 0.5) < 0.01
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.03
    assert not torch.equal(uniform, hashed_uniform(2, keys))
    # Pinned, so that a stored state means the same forever.
    assert hashed_uniform(0, torch.tensor(0)) == hashed_uniform(0, torch.arange(3))[0]


@pytest.mark.parametrize("optimizer", [AntitheticES(16), CoordinateDescent(60)], ids=repr)
def test_any_module_and_any_batch_size(optimizer):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(32, 3, dtype=torch.float64)
    y = x.sin().sum(1, keepdim=True)

    def criterion(output):
        return (output - y).square().mean()

    results = []
    for batch_size in (1, 5, 64):
        objective = ModuleObjective(module, criterion, x, batch_size=batch_size)
        results.append(minimize(objective, optimizer, objective.start, evaluations=500, seed=4))
    for other in results[1:]:
        assert_close(other.x, results[0].x)
        assert other.evaluations == results[0].evaluations
    objective.assign(results[0].x[0])
    assert float(criterion(module(x)).detach()) == pytest.approx(float(results[0].loss))
    with pytest.raises(SpecError, match="nothing"):
        ModuleObjective(module, criterion, x, names=["nothing"])


def eml_layer(d_model, head_dim, seed=0):
    spec = EmlAttentionSpec(head_dim=head_dim, causal=False, depth=3)
    layer = spec.build(LayerContext(d_model))
    layer.reset_parameters(1, torch.Generator().manual_seed(seed))
    return layer


def test_learns_the_mean_without_gradients():
    layer = eml_layer(8, 4)
    x, y = draw(position_mean, 160, 4, 8, seed=0)
    objective = ModuleObjective(layer, lambda out: (out.y - y).flatten(), x, batch_size=32)
    n = objective.start.shape[1]
    result = minimize(objective, GaussNewton(n), objective.start, evaluations=6 * (n + 4))
    objective.assign(result.x[0])
    fresh_x, fresh_y = draw(position_mean, 500, 4, 8, seed=1)
    with torch.no_grad():
        assert r_squared(layer(fresh_x).y, fresh_y) > 0.8


def test_output_channels_are_separate_problems():
    layer = eml_layer(12, 12)
    x, y = draw(identity, 32, 4, 12, seed=0)
    rows = output_rows(layer, x, y)
    residuals = rows(rows.start[:, None])[:, 0]
    with torch.no_grad():
        assert_close(residuals.T.reshape(y.shape), layer(x).y - y)
    n = rows.start.shape[1]
    result = minimize(rows, GaussNewton(n), rows.start, evaluations=3 * (n + 4))
    rows.assign(result.x)
    with torch.no_grad():
        after = (layer(x).y - y).square().mean((0, 1))
    assert_close(after, result.loss)
    assert float(after.mean()) < 0.2 * float(residuals.square().mean())


def test_r_squared():
    _, y = draw(position_mean, 64, 4, 8, seed=0)
    assert r_squared(y, y) == 1.0
    assert abs(r_squared(torch.full_like(y, float(y.mean())), y)) < 1e-6
