"""`minimize` on modules of every kind: vectorised where that works, one by one where not."""

import pytest
import torch
from conformance.cases import CHANNELS, MIXERS
from tolerance import assert_close
from torch import nn

from kizzasi.eml import (
    BlockDescent,
    CoordinateDescent,
    EmlAttentionSpec,
    GaussNewton,
    ModuleObjective,
    minimize,
    output_rows,
)
from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec
from kizzasi.models.moe import MixtureOfExperts, MoEConfig

D = 4


class Fork(nn.Module):
    """A branch on data, and numpy on the way."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        if self.up(x).sum() > 0:
            return self.up(x)
        return torch.as_tensor(self.down(x).numpy())


class Quantised(nn.Module):
    """An int8 weight with a scale per row: the scales and the bias are searched."""

    def __init__(self):
        super().__init__()
        levels = torch.randint(-7, 8, (D, D), dtype=torch.int8)
        self.levels = nn.Parameter(levels, requires_grad=False)
        self.scale, self.bias = nn.Parameter(torch.full((D, 1), 0.1)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return nn.functional.linear(x, self.levels * self.scale, self.bias)


def mixer(spec):
    layer = spec.build(LayerContext(D))
    layer.reset_parameters(1, torch.Generator().manual_seed(0))
    return layer


KINDS = {
    "gru": lambda: nn.GRU(D, D, batch_first=True),
    "lstm": lambda: nn.LSTM(D, D, batch_first=True),
    "conv": lambda: nn.Conv1d(6, 6, 3, padding=1),
    "batch norm": lambda: nn.Sequential(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)),
    "dropout": lambda: nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.3), nn.Linear(8, D)),
    "moe": lambda: MixtureOfExperts(MoEConfig(input_dim=D, output_dim=D, num_experts=2)),
    "mamba": lambda: mixer(MambaSpec(d_state=2)),
    "rwkv7": lambda: mixer(RWKV7Spec(head_dim=2)),
    "attention": lambda: mixer(AttentionSpec(n_heads=2)),
    "eml_attention": lambda: mixer(EmlAttentionSpec()),
    "an if on data": Fork,
    "quantised": Quantised,
}
# Of our own layers some refuse vmap today and need not tomorrow.
ENGINES = dict.fromkeys(("conv", "attention", "eml_attention", "quantised", "dropout"), "vmap")
ENGINES |= dict.fromkeys(("gru", "lstm", "batch norm", "an if on data"), "loop: vmap refuses")


def first(output):
    """The tensor among a module's outputs."""
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("kind", KINDS)
def test_minimize_in_five_lines(kind):
    torch.manual_seed(0)
    module, x = KINDS[kind](), torch.randn(3, 6, D)
    y = 0.5 * x.roll(1, 1)
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    objective = ModuleObjective(module, lambda out: (first(out) - y).square().mean(), x)
    found = minimize(objective, evaluations=260)
    objective.assign(found.x)

    before, after = found.history[0][1], float(found.loss)
    assert after < before
    assert isinstance(found.optimizer, BlockDescent)
    assert objective.engine == "vmap" or objective.engine.startswith("loop: vmap refuses (")
    assert kind not in ENGINES or objective.engine.startswith(ENGINES[kind])
    points = objective.start + 0.1 * torch.randn(1, 3, objective.start.shape[1])
    slow = ModuleObjective(module, lambda out: (first(out) - y).square().mean(), x, vectorise=False)
    assert kind == "dropout" or torch.allclose(objective(points), slow(points), rtol=1e-4)
    assert float(objective(objective.start[None])) == pytest.approx(after, rel=1e-4)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("kind", ["conv", "dropout", "attention", "eml_attention", "quantised"])
def test_loop_equals_vmap(kind):
    torch.manual_seed(0)
    module, x = KINDS[kind]().eval(), torch.randn(3, 6, D)
    fast, slow = (
        ModuleObjective(module, lambda out: first(out).flatten(), x, vectorise=v)
        for v in (True, False)
    )
    points = fast.start + 0.1 * torch.randn(1, 5, fast.start.shape[1])
    assert_close(fast(points), slow(points))
    assert (fast.engine, slow.engine) == ("vmap", "loop: as asked")


def test_a_candidates_loss_is_its_own():
    """Dropout draws the same numbers for every candidate, batch and call, and spares the stream."""
    torch.manual_seed(0)
    module, x = KINDS["dropout"](), torch.randn(3, 6, D)
    losses = []
    for options in ({}, {"batch_size": 1}, {"vectorise": False}):
        torch.manual_seed(7)
        objective = ModuleObjective(module, lambda out: out.square().mean(), x, **options)
        points = objective.start[None].expand(1, 3, -1)
        stream = torch.get_rng_state()
        losses.append(torch.cat((objective(points), objective(points[:, :1])), 1)[0])
        assert torch.equal(stream, torch.get_rng_state())
        assert_close(losses[-1], losses[-1][:1].expand(4))
    assert_close(losses[1], losses[0])


def test_frozen_parameters_are_left_alone():
    module = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    objective = ModuleObjective(module, lambda out: out.square().mean(), torch.randn(5, D))
    assert objective.start.shape == (1, D * D + D)
    objective.assign(minimize(objective, evaluations=100).x)
    assert torch.equal(module[0].weight, before)
    named = ModuleObjective(module, torch.mean, torch.randn(5, D), names=["0.weight"])
    assert named.start.shape == (1, D * D)
    with pytest.raises(SpecError, match="nothing to search over"):
        ModuleObjective(module.requires_grad_(False), torch.mean, torch.randn(5, D))
    with pytest.raises(SpecError, match="nothing to search over"):
        ModuleObjective(nn.ReLU(), torch.mean, torch.randn(5, D))


def test_keyword_inputs():
    class Scaled(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    module, x = Scaled(D, D), torch.randn(5, D)
    plain, doubled = (
        ModuleObjective(module, lambda out: out.sum(), x, keywords={"scale": scale})
        for scale in (1.0, 2.0)
    )
    points = plain.start[None]
    assert_close(doubled(points), 2 * plain(points))


def test_mini_batches():
    torch.manual_seed(0)
    module, target = nn.Linear(D, D), nn.Linear(D, D).requires_grad_(False)
    batches = [torch.randn(8, D) for _ in range(4)]

    def on(x):
        return ModuleObjective(module, lambda out: (out - target(x)).square().mean(), x)

    objectives = [on(x) for x in batches]
    found = minimize(objectives, evaluations=3000, per_batch=150)
    assert max(float(each(found.x[None])) for each in objectives) < 1e-3
    half = minimize(objectives, evaluations=1500, per_batch=150)
    resumed = minimize(objectives, evaluations=3000, per_batch=150, resume=half)
    assert torch.equal(resumed.x, found.x)
    assert float(objectives[found.turn % 4](found.x[None])) == pytest.approx(float(found.loss))
    found = minimize(objectives, CoordinateDescent(), evaluations=1001, per_batch=100)
    assert (found.evaluations, found.turn) == (1001, 9)
    assert int(found.state.trial) == 1001 - 1 - 9  # nine points were measured anew
    residuals = [
        ModuleObjective(module, lambda out, x=x: (out - target(x)).flatten(), x) for x in batches
    ]
    found = minimize(residuals, evaluations=200, per_batch=40)
    assert isinstance(found.optimizer, GaussNewton)
    assert found.loss < 1e-6


def test_half_precision_and_complex_parameters():
    class Turn(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.low = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

        def forward(self):
            return (self.z - 3j).abs().square().mean() + (self.low.float() - 0.5).square().mean()

    module = Turn()
    objective = ModuleObjective(module, lambda loss: loss)
    assert objective.start.dtype == torch.float32
    assert objective.start.shape == (1, 6)
    objective.assign(minimize(objective, evaluations=1000).x)
    assert float(module().detach()) < 1e-3
    assert module.z.is_complex()
    assert module.low.dtype == torch.bfloat16


LINE, X = nn.Linear(D, D), torch.zeros(5, D)
SCALAR = ModuleObjective(LINE, lambda out: out.square().mean(), X)
RESIDUALS = ModuleObjective(LINE, lambda out: out.flatten(), X)
N = D * D + D
MISTAKES = {
    "one loss for Gauss-Newton": (
        lambda: minimize(SCALAR, GaussNewton(), evaluations=9), "needs residuals.*flatten"),
    "residuals for coordinate descent": (
        lambda: minimize(RESIDUALS, CoordinateDescent(), evaluations=9), "needs one loss.*scalar"),
    "a matrix from the criterion": (
        lambda: ModuleObjective(LINE, lambda out: out, X)(SCALAR.start[None]), "returned.*mean"),
    "a number from the criterion": (
        lambda: ModuleObjective(LINE, lambda out: 1.0, X)(SCALAR.start[None]), "returned float"),
    "two points": (lambda: SCALAR.assign(torch.zeros(2, N)), r"give one point.*\(1, 20\)"),
    "points of two dimensions": (lambda: SCALAR(torch.zeros(2, N)), r"must be \(R, P, 20\)"),
    "a start of one dimension": (
        lambda: minimize(SCALAR, start=SCALAR.start[0], evaluations=9), r"start\[None\]"),
    "no start": (lambda: minimize(lambda p: p.sum(-1), evaluations=9), "give start"),
    "no budget": (lambda: minimize(SCALAR, evaluations=0), "evaluations is 0"),
    "no mini-batch": (lambda: minimize([], evaluations=9), "empty list"),
    "another optimiser": (
        lambda: minimize(SCALAR, GaussNewton(), evaluations=99,
                         resume=minimize(SCALAR, evaluations=9)), "resume holds a state of Block"),
    "a block of 0": (lambda: GaussNewton(0), "block must be >= 1"),
    "no trials": (lambda: CoordinateDescent(0), "counts must be >= 1"),
    "an unknown name": (
        lambda: ModuleObjective(LINE, torch.mean, X, names=["w"]), "choose from.*weight"),
    "vectorise what cannot be": (
        lambda: ModuleObjective(Fork(), lambda out: out.mean(), X, vectorise=True)(
            torch.zeros(1, 1, 2 * N)), "vmap refuses.*leave vectorise out"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_have_messages_of_our_own(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises((SpecError, ShapeError), match=message):
        call()


def test_an_error_of_the_modules_own_appears_as_it_is():
    objective = ModuleObjective(LINE, lambda out: out.mean(), torch.zeros(5, D + 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        objective(objective.start[None])


def test_rows_take_all_of_the_points():
    layer, x = mixer(EmlAttentionSpec(causal=False)), torch.randn(4, 3, D)
    rows = output_rows(layer, x, x)
    found = minimize(rows, evaluations=60)
    rows.assign(found.x)
    with pytest.raises(ShapeError, match=r"give .* all of found\.x"):
        rows.assign(found.x[0])


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -1])
def test_any_integer_is_a_seed(seed):
    found = minimize(SCALAR, CoordinateDescent(), evaluations=50, seed=seed)
    assert torch.equal(
        minimize(SCALAR, CoordinateDescent(), evaluations=50, seed=seed % 2**64).x, found.x
    )
    assert not torch.equal(minimize(SCALAR, CoordinateDescent(), evaluations=50).x, found.x)


@pytest.mark.parametrize("batch", [1, 5, None])
def test_the_budget_is_given_once(batch):
    """The schedule comes down by the end of the budget, and the batch changes nothing."""
    module = nn.Linear(D, D)
    objective = ModuleObjective(module, lambda out: out.square().mean(), torch.randn(9, D))
    found = minimize(objective, CoordinateDescent(batch=batch), evaluations=400)
    alone = minimize(objective, CoordinateDescent(399, batch=1), evaluations=400)
    assert_close(found.x, alone.x)
    assert found.evaluations == alone.evaluations == alone.asked == 400
    assert int(found.state.trial) == 399
    assert found.asked == 400 or batch != 1
    cut, alone = (
        minimize(objective, CoordinateDescent(900, batch=each), evaluations=150)
        for each in (batch, 1)
    )
    assert cut.evaluations == alone.evaluations == 150
    assert_close(cut.x, alone.x)


def test_tell_leaves_its_arguments_alone():
    objective = ModuleObjective(LINE, lambda out: out.flatten(), torch.randn(5, D))
    optimizer = GaussNewton(8)
    state = optimizer.init(objective.start, objective(objective.start[None])[:, 0], 0, 99)
    for _ in range(4):
        candidates = optimizer.ask(state)
        residuals = objective(candidates)
        kept = candidates.clone(), residuals.clone(), state
        state = optimizer.tell(state, candidates, residuals)
        assert torch.equal(candidates, kept[0])
        assert torch.equal(residuals, kept[1])
        assert state.x is not kept[2].x or torch.equal(state.x, kept[2].x)


def registered():
    """One variant of every registered mixer and channel."""
    kinds = {}
    for name, spec in {**MIXERS, **CHANNELS}.items():
        kinds.setdefault(name.split("-")[0], spec)
    return kinds


@pytest.mark.parametrize("kind", registered())
def test_every_registered_layer(kind):
    layer = registered()[kind].build(LayerContext(16))
    layer.reset_parameters(1, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    x = torch.randn(2, 7, 16)
    auto, slow = (
        ModuleObjective(layer, lambda out: first(out).flatten(), x, vectorise=v)
        for v in (None, False)
    )
    points = auto.start + 0.05 * torch.randn(1, 3, auto.start.shape[1])
    assert_close(auto(points), slow(points))


def test_one_by_one_the_module_is_put_back_as_it_was():
    class Counting(nn.Module):
        """Asks for its parameter by name, as no vectorised call allows; replaces its buffer."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            if not x.isfinite().all():
                raise ValueError("no number")
            return x * self.get_parameter("weight")

    module, x = Counting(), torch.ones(3, D)
    weight, place, calls = module.weight, module.weight.data_ptr(), module.calls
    loss = module(x).square().sum()  # a graph that a change of the weight would break
    calls = module.calls
    objective = ModuleObjective(module, lambda out: out.square().mean(), x)
    found = minimize(objective, evaluations=100)
    assert objective.engine.startswith("loop")
    assert module.weight is weight
    assert weight.data_ptr() == place
    assert module.calls is calls
    assert float(calls) == 1
    loss.backward()
    assert torch.equal(weight.grad, torch.full((D,), 6.0))
    x.fill_(torch.nan)
    with pytest.raises(ValueError, match="no number"):
        objective(objective.start[None])
    assert weight.data_ptr() == place
    objective.assign(found.x)
    assert weight.data_ptr() == place
    assert torch.equal(weight.detach(), found.x[0])
