"""The compiled descent takes the path of one candidate at a time, and may be absent."""

import functools
import math

import pytest
import torch

from kizzasi.eml import BaselineAttention, EndToEndTrainConfig, ToyEmlAttention
from kizzasi.eml.core import flat
from kizzasi.eml.core.descent import DESCENT, descend, descend_ref, draw_trials
from kizzasi.models.ops.engines import Engines

library = pytest.importorskip(
    "kizzasi.models.ops.native.library",
    reason="no compiled kernels here: python -m kizzasi.models.ops.native.build",
    exc_type=ImportError,
)
CPU = torch.device("cpu")
CASES = [(4, 2, 2, 3), (8, 4, 4, 5), (6, 6, 1, 3), (4, 1, 3, 4), (7, 5, 3, 3), (16, 8, 8, 3)]
every_isa = pytest.mark.parametrize("isa", library.AVAILABLE)


def toy(*sizes, spread=0.3):
    """A model whose parameters are spread far enough to matter."""
    kind = ToyEmlAttention if len(sizes) == 4 else BaselineAttention
    built, generator = kind("t", *sizes), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in built.parameters():
            p.uniform_(-spread, spread, generator=generator)
    return built


def data(model, count):
    generator = torch.Generator().manual_seed(0)
    width = model.seq_len * model.d_model
    x = torch.rand(count, width, generator=generator, dtype=torch.float64) * 2 - 1
    return x, x.flip(1)


def parameters(model):
    return torch.cat([p.detach() for p in model.parameters()]).tolist()


@functools.cache
def path(engine, make, n_samples, trials, isa=library.AVAILABLE[-1]):
    """What a descent comes to: (accepts, parameters), (error before, after)."""
    model = make()
    x, y = data(model, n_samples)
    given = draw_trials(EndToEndTrainConfig(trials=trials), 1, model.param_count, "fixed")
    with library.using(isa):
        before, after, accepts = DESCENT.pick(engine, CPU)(model, x, y, *given)
    with torch.no_grad():
        assert after == pytest.approx(float((model(x) - y).square().mean()), rel=1e-12)
    return (accepts, parameters(model)), (before, after)


def assert_one_path(make, n_samples, trials, isa=library.AVAILABLE[-1], *, kept):
    """The definition and the kernel, from one start: equal decisions, equal parameters."""
    plain = path("reference", make, n_samples, trials)
    fast = path("native", make, n_samples, trials, isa)
    assert plain[0] == fast[0]
    assert fast[1] == pytest.approx(plain[1], rel=1e-12)
    assert fast[0][0] > kept


STARTS = {
    (*sizes, spread): functools.partial(toy, *sizes, spread=spread)
    for case in CASES
    for sizes in (case, case[:3])
    for spread in (0.05, 0.5)
}


@every_isa
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_the_kernel_takes_the_path_of_one_by_one_evaluation(start, isa):
    assert_one_path(STARTS[start], 6, 80, isa, kept=10)


def extreme():
    model = ToyEmlAttention("t", 8, 4, 4, 3)
    with torch.no_grad():
        model.q_model.split()[2][:, -1] = torch.tensor([1.0, 1.5, 0.0])
        model.k_model.split()[2][3, -1] = torch.tensor([8.0, 0.0, -2.0])
        model.out_model.split()[2][5, 1:] = torch.tensor([-100.0, 0.1, -1.5])
    return model


@every_isa
@pytest.mark.parametrize("n_samples", [4, 40])
def test_exponents_are_clamped_logarithms_floored_and_attention_saturated(n_samples, isa):
    assert_one_path(extreme, n_samples, 300, isa, kept=30)


def test_rounding_does_not_pile_up():
    """Longer than what is moved step by step between two recomputations."""
    assert_one_path(STARTS[4, 2, 2, 3, 0.05], 16, 600, kept=100)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_kept_and_always_left(bad):
    """From a start that has no loss, the first trial that has one is kept."""

    def broken():
        model = toy(4, 2, 2, 3)
        with torch.no_grad():
            model.out_model.params[2] = bad
        return model

    ends = []
    for engine in ("reference", "native"):
        model = broken()
        index, delta = draw_trials(EndToEndTrainConfig(trials=40), 1, model.param_count, "fixed")
        before, after, accepts = DESCENT.pick(engine, CPU)(model, *data(model, 5), index, delta)
        assert not math.isfinite(before)
        ends.append((accepts, after))
    assert ends == [(0, math.inf)] * 2


def test_a_tree_that_is_not_in_use_is_left_alone():
    model = toy(4, 2, 2, 3)
    before = model.softmax_model.params.tolist()
    model.samples.extend(zip(*data(model, 20), strict=True))
    model.train_end_to_end(EndToEndTrainConfig(trials=300))
    assert model.softmax_model.params.tolist() == before
    assert model.last_accepts > 20


@pytest.mark.parametrize("sizes", [(4, 2, 2, 3), (4, 2, 2)])
def test_without_the_library_training_is_the_same(sizes, monkeypatch):
    config = EndToEndTrainConfig(trials=300)
    ends = []
    for native in ("kizzasi.eml.core.native:descend", "kizzasi.eml.core.nowhere:descend"):
        table = Engines("eml_descent", reference=descend_ref, torch=descend, native=native)
        monkeypatch.setattr(flat, "DESCENT", table)
        model = toy(*sizes)
        model.samples.extend(zip(*data(model, 20), strict=True))
        final = model.train_end_to_end(config)
        ends.append((table.resolve("auto", CPU), model.last_accepts, parameters(model)))
        assert final == pytest.approx(model.train_end_to_end(EndToEndTrainConfig(1)), rel=0.1)
    assert [end[0] for end in ends] == ["native", "torch"]
    assert ends[0][1:] == ends[1][1:]


def test_other_dtypes_are_searched_in_float64():
    ends = []
    for dtype in (torch.float64, torch.float32):
        model = toy(4, 2, 2, 3).to(dtype)
        x, y = data(model, 16)
        given = draw_trials(EndToEndTrainConfig(trials=200), 1, model.param_count, "fixed")
        ends.append(DESCENT.pick("native", CPU)(model, x.to(dtype), y.to(dtype), *given))
        assert next(model.parameters()).dtype == dtype
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
