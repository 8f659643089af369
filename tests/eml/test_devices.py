"""The same code on any device: every optimiser, objective and trainer.

Without CUDA the runs are made on the CPU while tensors made without a device land on `meta`, so a
tensor that does not follow its inputs raises. With CUDA they are made there, and agree with the
CPU.
"""

import contextlib

import pytest
import torch
from tolerance import assert_close
from torch import nn

from kizzasi.eml import (
    AntitheticES,
    BaselineAttention,
    BlockDescent,
    CoordinateDescent,
    EmlAttentionSpec,
    EmlModel,
    EndToEndTrainConfig,
    GaussNewton,
    ModuleObjective,
    PatternSearch,
    SeparableCma,
    Spsa,
    ToyEmlAttention,
    TreeSearch,
    compare_eml_vs_baseline,
    compile_expression,
    evaluate,
    minimize,
    output_rows,
    run_benchmark_with_trials,
    search_tree,
    train_master_formula,
)
from kizzasi.eml.core.descent import DESCENT
from kizzasi.eml.search.coordinate import ListedDescent
from kizzasi.eml.tasks import FEYNMAN, draw, identity
from kizzasi.models.mixer import LayerContext

PLACES = ["stray", pytest.param("cuda", marks=pytest.mark.cuda)]
every_place = pytest.mark.parametrize("place", PLACES)
OPTIMIZERS = [
    CoordinateDescent(),
    CoordinateDescent(block=2, batch=3),
    ListedDescent(torch.arange(60) % 6, torch.linspace(-0.5, 0.5, 60).double()),
    BlockDescent(),
    PatternSearch(),
    AntitheticES(population=8),
    Spsa(pairs=2, adam=True),
    Spsa(),
    SeparableCma(),
    GaussNewton(4),
]


@contextlib.contextmanager
def at(place):
    """The device to run on, within which a tensor that was given none is of no use."""
    with torch.device("meta") if place == "stray" else contextlib.nullcontext():
        yield torch.device("cpu" if place == "stray" else place)


def test_stray_tensors_are_caught():
    x = torch.ones(3)
    with at("stray"):
        for stray in (
            lambda: x + torch.arange(3),
            lambda: torch.where(x > 0, x, torch.tensor(1.0)),
        ):
            with pytest.raises(RuntimeError, match="meta"):
                stray()


def valley(points):
    a, b = points[..., :-1], points[..., 1:]
    return torch.cat((1 - a, 3 * (b - a.square())), -1)


@every_place
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_optimizers(optimizer, place):
    def objective(points):
        return valley(points) if optimizer.residuals else valley(points).square().sum(-1)

    start = torch.zeros(2, 6, dtype=torch.float64)
    here = minimize(objective, optimizer, start, evaluations=200, seed=1)
    with at(place) as device:
        there = minimize(objective, optimizer, start.to(device), evaluations=200, seed=1)
        renewed = optimizer.renew(there.state, objective(there.x[:, None])[:, 0])
    assert there.x.device.type == device.type
    assert {t.device.type for t in renewed if isinstance(t, torch.Tensor)} == {device.type}
    assert_close(there.x.cpu(), here.x)


MODULES = {
    "vmap": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 4)),
    "loop": lambda: nn.GRU(4, 4, batch_first=True),
    "eml": lambda: eml_layer(),
}


def eml_layer():
    layer = EmlAttentionSpec(causal=False).build(LayerContext(4))
    layer.reset_parameters(1, torch.Generator().manual_seed(0))
    return layer


@every_place
@pytest.mark.parametrize("kind", MODULES)
def test_module_objectives(kind, place):
    torch.manual_seed(0)
    module, x = MODULES[kind](), torch.randn(3, 5, 4)
    with at(place) as device:
        module, x = module.to(device), x.to(device)

        def criterion(out):
            y = out if isinstance(out, torch.Tensor) else out[0]
            return (y - x).square().mean()

        objective = ModuleObjective(module, criterion, x)
        before = objective(objective.start[None])
        found = minimize(objective, evaluations=120)
        objective.assign(found.x)
        assert found.x.device.type == device.type
        assert (objective(objective.start[None]) < before).all()


@every_place
def test_output_rows(place):
    layer, x = eml_layer(), torch.randn(6, 5, 4)
    with at(place) as device:
        layer, x = layer.to(device), x.to(device)
        rows = output_rows(layer, x, x)
        found = minimize(rows, evaluations=60)
        rows.assign(found.x)
        assert (found.loss < rows(rows.start[:, None]).square().mean(-1)[:, 0] + 1e-5).all()


def toy(kind):
    depth = (3,) if kind is ToyEmlAttention else ()
    model = kind("t", 4, 2, 2, *depth)
    generator = torch.Generator().manual_seed(0)
    for x in torch.rand(20, 8, generator=generator, dtype=torch.float64) * 2 - 1:
        model.record(x, x.flip(0))
    return model


@every_place
@pytest.mark.parametrize("softmax", ["numerical", "tree"])
@pytest.mark.parametrize("kind", [ToyEmlAttention, BaselineAttention])
def test_toy_models_train_where_they_are(kind, softmax, place):
    if softmax == "tree" and kind is BaselineAttention:
        return
    here, there = toy(kind), toy(kind)
    here.tree_softmax = there.tree_softmax = softmax == "tree"
    config = EndToEndTrainConfig(trials=120)
    final = here.train_end_to_end(config)
    with at(place) as device:
        there.to(device)
        if place == "stray":  # the way of any device but the CPU
            assert there.train_end_to_end(config, batch=16) == pytest.approx(final, rel=1e-9)
        else:
            assert DESCENT.resolve("auto", device) == "torch"  # the host is not used
            assert there.train_end_to_end(config) == pytest.approx(final, rel=1e-6)
        assert {p.device.type for p in there.parameters()} == {device.type}
    assert there.last_accepts > 0


@every_place
def test_eml_model_trains_where_it_is(place):
    with at(place) as device:
        model = EmlModel(3, 2, 2, device=device)
        for i in range(60):
            a, b = (i * 7 % 60) / 60, (i * 11 % 60) / 60
            model.record([a, b], [1 + a * b, None])
        model.train(max_sweeps=2)
        (event,) = model.drain_events()
        assert event.mse_after < event.mse_before
        assert model.params.device.type == device.type
        student = model.distill(2, 60, max_sweeps=1)
        assert student.params.device.type == device.type


@every_place
def test_autograd_trains_the_layer_too(place):
    layer, x = eml_layer(), torch.randn(6, 5, 4)
    with at(place) as device:
        layer, x = layer.to(device), x.to(device)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            loss = (layer(x).y - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]


@every_place
def test_exact_trees_are_found_where_the_samples_are(place):
    with at(place) as device:
        x = {"x": torch.linspace(0.3, 1.7, 10, dtype=torch.float64, device=device)}
        tree = compile_expression("ln(x)")
        y = evaluate(tree, x)
        assert y.device.type == device.type
        assert search_tree(x, y, 3).tree is tree
        search = TreeSearch(x)
        search.known.grow()
        search.known.grow()
        assert search._peeled(y, 1, 1e-8, 10**6) is not None
        assert next(search._peeled(y, 0, 1e-8, 10**6)).depth == 3
        trained = train_master_formula(x, torch.exp(x["x"]), 1, restarts=8, steps=20)
        assert trained.tree is not None


@every_place
def test_tasks_are_drawn_alike_on_every_device(place):
    here = draw(identity, 3, 4, 5, 0), FEYNMAN[0].draw(9, 0)
    with at(place) as device:
        there = draw(identity, 3, 4, 5, 0, device=device), FEYNMAN[0].draw(9, 0, device=device)
    for drawn, again in zip(here, there, strict=True):
        for a, b in zip(drawn, again, strict=True):
            assert b.device.type == device.type
            assert_close(b.cpu(), a)


@pytest.mark.cuda
def test_the_benchmark_runs_on_cuda():
    here, there = (run_benchmark_with_trials(8, 2, 4, 3, 60, device=d) for d in ("cpu", "cuda"))
    assert there.phase2_final_mse == pytest.approx(here.phase2_final_mse, rel=1e-6)
    assert there.phase3_inference_ns_p99 >= there.phase3_inference_ns_mean > 0
    config = EndToEndTrainConfig(trials=60)
    here, there = (
        compare_eml_vs_baseline(4, 2, 2, 3, config, 1, device=d) for d in ("cpu", "cuda")
    )
    assert there.eml_final_mse == pytest.approx(here.eml_final_mse, rel=1e-6)
    assert there.baseline_final_mse == pytest.approx(here.baseline_final_mse, rel=1e-6)
