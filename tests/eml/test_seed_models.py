"""Operators, trees, the toy models' interface, JSON, and trials against their plain definition."""

import json
import math

import numpy as np
import pytest
import torch
from tolerance import assert_close

from kizzasi.eml import (
    BaselineAttention,
    EmlModel,
    EndToEndTrainConfig,
    SafeTree,
    ToyEmlAttention,
    Trained,
    eml,
    eml_safe,
    eml_soft,
    softmax3,
)
from kizzasi.eml.core.descent import descend, draw_trials
from kizzasi.eml.core.events import event_from_dict
from kizzasi.eml.core.rng import Lcg
from kizzasi.errors import CheckpointError, ShapeError, SpecError


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def toy(*sizes, model=ToyEmlAttention, spread=0.3, seed=0, **options):
    """A model whose parameters are spread far enough to matter."""
    torch.manual_seed(seed)
    built = model("t", *sizes, **options)
    with torch.no_grad():
        for p in built.parameters():
            p.uniform_(-spread, spread)
    return built


def test_operators():
    assert_close(eml(values(0.0, 1.0), values(math.e, 1.0)), values(0.0, math.e))
    safe = eml_safe(values(100.0, -100.0, 0.0, 0.0), values(1.0, 1.0, 0.0, -5.0))
    tiny = math.log(torch.finfo(torch.float64).tiny)
    assert_close(safe, values(math.exp(20), math.exp(-20), 1 - tiny, 1 - tiny))
    assert eml_safe(values(math.nan), values(1.0)).isnan()
    y = values(-1.0, 0.0, 2.0).requires_grad_()
    eml_safe(torch.zeros_like(y), y).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [0.0, 0.0, -0.5]
    assert eml_soft(values(1e9, -1e9), values(-1e9, 1e3)).isfinite().all()
    assert_close(sum(softmax3(*values(1.0, 2.0, 3.0))), values(1.0)[0])


def test_safe_tree_matches_a_scalar_loop_and_batches():
    tree = SafeTree(3, 4, 5)
    torch.manual_seed(0)
    with torch.no_grad():
        tree.params.uniform_(-1, 1)
    assert tree.param_count == 5 * 4 + 5 + 5 * 3 * 3
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    flat = tree.params.tolist()
    expected = torch.empty(2, 3, 5, dtype=torch.float64)
    for place in np.ndindex(2, 3):
        for h in range(5):
            v = flat[20 + h] + sum(flat[4 * h + i] * float(x[place][i]) for i in range(4))
            for level in range(3):
                c0, c1, c2 = flat[25 + 9 * h + 3 * level : 28 + 9 * h + 3 * level]
                y = abs(v) + c2 + 1
                ln = math.log(y) if y > 0 else math.log(torch.finfo(torch.float64).tiny)
                v = math.exp(min(max(v * c0 + c1, -20), 20)) - ln
            expected[(*place, h)] = v
    assert_close(tree(x).detach(), expected)
    again = SafeTree.from_json(tree.to_json())
    assert torch.equal(again.params, tree.params)
    assert list(json.loads(tree.to_json())) == ["depth", "inputs", "heads", "params"]
    with pytest.raises(ShapeError, match="last size must be 4"):
        tree(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 4, 4, 2), "depth is 2"),
        ((8, 4, 4, 6), "depth is 6"),
        ((8, 4, 9, 3), "seq_len is 9"),
        ((33, 4, 4, 3), "d_model is 33"),
        ((8, 9, 4, 3), "d_k is 9"),
        ((0, 0, 4, 3), "d_model is 0"),
    ],
)
def test_limits(sizes, message):
    with pytest.raises(SpecError, match=message):
        ToyEmlAttention("t", *sizes)


def test_shapes_and_batches():
    model = toy(8, 4, 4, 3)
    x = torch.rand(5, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_close(model(x)[3], model(x[3]))
        assert model.float()(x.float()).dtype == torch.float32
    for call in (lambda: model(x[0, :5]), lambda: model.record(x[0], x[0, :5])):
        with pytest.raises(ShapeError, match="seq_len"):
            call()
    with pytest.raises(SpecError, match="rng"):
        ToyEmlAttention("t", 4, 2, 2, 3, rng="other")  # pyright: ignore[reportArgumentType]


def test_initial_range_is_repaired():
    fixed, seed = (ToyEmlAttention("t", 4, 2, 2, 3, r).q_model.params for r in ("fixed", "seed"))
    assert seed.max() < 0 < fixed.max() < 0.05
    assert abs(float(fixed.detach().mean())) < 0.01


@pytest.mark.parametrize("model", [ToyEmlAttention, BaselineAttention])
def test_training_buffer_events_and_json(model):
    depth = (3,) if model is ToyEmlAttention else ()
    built = model("t", 4, 2, 2, *depth)
    assert built.train_end_to_end() == math.inf
    for x in torch.rand(300, 8, dtype=torch.float64):
        built.record(x, x)
    assert built.buffer_len == 256
    final = built.train_end_to_end(EndToEndTrainConfig(trials=200, convergence_mse=10.0))
    assert built.trained
    assert built.training_rounds == 2
    again = model.from_json(built.to_json())
    x = torch.rand(8, dtype=torch.float64)
    assert torch.equal(again(x), built(x))
    assert again.to_json() == built.to_json()
    if model is ToyEmlAttention:
        (event,) = built.drain_events()
        assert isinstance(event, Trained)
        assert event.mse_after == final
        assert event.kind == "eml.trained"
        assert event_from_dict(event.to_dict()) == event
        assert built.drain_events() == []
    damaged = json.loads(built.to_json()) | {"d_model": 5}
    for text in ("nonsense", "[]", "{}", json.dumps(damaged)):
        with pytest.raises(CheckpointError):
            model.from_json(text)


def test_seed_json_key_order_and_trained_softmax():
    model = toy(4, 2, 2, 3, rng="seed", spread=0.05)
    assert list(json.loads(model.to_json())) == [
        "name", "d_model", "d_k", "seq_len", "q_model", "k_model", "v_model", "softmax_model",
        "out_model", "scale", "trained", "training_rounds",
    ]  # fmt: skip
    x = torch.rand(8, dtype=torch.float64)
    numerical = model(x)
    fields = json.loads(model.to_json()) | {"trained": True}
    assert not torch.equal(ToyEmlAttention.from_json(json.dumps(fields))(x), numerical)


def test_browser_bundle():
    model = toy(4, 2, 2, 3)
    bundle = {}
    for key in ("q", "k", "v", "out"):
        tree = getattr(model, f"{key}_model")
        weight, bias, chain = (part.tolist() for part in tree.split())
        fields = {"model_name": key, "depth": 3, "inputs": tree.inputs, "heads": tree.heads}
        fields |= {"level0_weight": weight, "level0_bias": bias, "trained": True}
        fields |= {"tree_params": [[v for level in head for v in level] for head in chain]}
        bundle[key] = json.dumps(fields)
    x = torch.rand(3, 8, dtype=torch.float64)
    imported = ToyEmlAttention.from_browser_bundle("b", bundle, seq_len=2)
    assert torch.equal(imported(x), model(x))
    assert imported.trained
    with pytest.raises(CheckpointError, match="level0_bias"):
        ToyEmlAttention.from_browser_bundle("b", bundle | {"q": '{"depth": 3}'}, seq_len=2)


@pytest.mark.parametrize("batch", [7, 64, None])
def test_speculation_keeps_the_sequential_path(batch):
    path = []
    for size in (1, batch):
        model, x = toy(8, 4, 4, 3, spread=0.05), samples(5, 32)
        trials = draw_trials(EndToEndTrainConfig(trials=300), 1, model.param_count, "fixed")
        before, after, accepts = descend(model, x, x.flip(1), *trials, batch=size)
        assert after < before
        with torch.no_grad():
            assert after == pytest.approx(float((model(x) - x.flip(1)).square().mean()), rel=1e-12)
        path.append((accepts, [p.tolist() for p in model.parameters()]))
    assert path[0] == path[1]
    assert path[0][0] > 50


def samples(count, width):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, width, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("depth", "count"), [(2, 24), (3, 32), (4, 44), (5, 56)])
def test_eml_model_counts_and_json(depth, count):
    model = EmlModel(depth, 3, 2)
    assert model.param_count == count + 4
    model.params = torch.linspace(-1, 1, model.param_count, dtype=torch.float64)
    x = torch.rand(4, 3, dtype=torch.float64)
    y = model.predict(x)
    assert y.shape == (4, 2)
    assert (y >= 0).all()
    assert y.isfinite().all()
    assert torch.equal(EmlModel.from_json(model.to_json()).predict(x), y)
    dead = torch.arange(12, 24) if depth == 2 else torch.arange(0)
    model.params[dead] += 1.0
    assert torch.equal(model.predict(x), y)


def test_eml_model_learns_skips_unknown_targets_and_distills():
    model = EmlModel(3, 2, 2)
    lcg = Lcg(3)
    for _ in range(60):
        a, b = lcg.unit(), lcg.unit()
        model.record([a, b], [1 + a * b, None])
    model.train(max_sweeps=6)
    (event,) = model.drain_events()
    assert isinstance(event, Trained)
    assert event.mse_after < 2.0 < event.mse_before
    student = model.distill(2, 60, max_sweeps=2)
    assert (student.depth, len(student.samples)) == (2, 60)
    assert EmlModel(3, 2, 1).train() is False
    for call in (lambda: EmlModel(6, 1, 1), lambda: model.distill(3, 10)):
        with pytest.raises(SpecError):
            call()
