"""The regression tasks: values worked out by hand, ranges, repeatability, and the score."""

import math

import pytest
import torch
from tolerance import assert_close

from kizzasi.eml.tasks import FEYNMAN, draw, identity, position_mean, r_squared

every_formula = pytest.mark.parametrize("formula", FEYNMAN, ids=lambda f: f.name)

# Name: variables and the value there.
POINTS = {
    "I.6.2": ((1.0, 1.0), math.exp(-0.5) / math.sqrt(2 * math.pi)),
    "I.8.14": ((1.0, 4.0, 1.0, 5.0), 5.0),
    "I.12.2": ((2.0, 3.0, 1.5, 2.0), 0.25 / math.pi),
    "I.12.11": ((2.0, 1.0, 3.0, 5.0, math.pi / 2), 32.0),
    "I.15.10": ((4.0, 1.8, 3.0), 9.0),
    "I.18.4": ((1.0, 3.0, 1.0, 5.0), 4.0),
    "I.27.6": ((2.0, 4.0, 2.0), 1.0),
    "I.29.16": ((3.0, 4.0, 1.0, 1.0 + math.pi / 2), 5.0),
    "I.40.1": ((5.0, 2.0, 3.0, 4.0, 1.0, 1.5), 5.0 / math.e),
    "I.50.26": ((3.0, 1.0, math.pi / 3, 2.0), 3.0),
}


def test_ten_formulas():
    assert {formula.name for formula in FEYNMAN} == set(POINTS)
    assert len(FEYNMAN) == 10


@every_formula
def test_value_at_a_point(formula):
    variables, value = POINTS[formula.name]
    got = formula.function(*torch.tensor(variables, dtype=torch.float64))
    assert_close(got, torch.tensor(value, dtype=torch.float64))


@every_formula
def test_samples_fill_their_ranges_and_repeat(formula):
    x, y = formula.draw(2000, 3)
    assert x.shape == (2000, len(formula.ranges))
    assert y.shape == (2000,)
    low, high = torch.tensor(formula.ranges).unbind(1)
    margin = (high - low) / 100
    assert ((x >= low) & (x <= high)).all()
    assert (x.amin(0) < low + margin).all()
    assert (x.amax(0) > high - margin).all()
    assert y.isfinite().all()
    assert float(y.std()) > 0.01
    again_x, again_y = formula.draw(2000, 3)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    assert not torch.equal(x, formula.draw(2000, 4)[0])


@every_formula
def test_precision_changes_the_rounding_only(formula):
    x, y = formula.draw(50, 0, torch.float64)
    assert x.dtype == y.dtype == torch.float64
    single_x, single_y = formula.draw(50, 0)
    assert torch.equal(single_x, x.float())
    assert torch.equal(single_y, y.float())
    assert_close(formula.function(*x.unbind(1)), y)


@pytest.mark.parametrize("task", [position_mean, identity])
def test_sequence_tasks(task):
    x, y = draw(task, 20, 4, 8, seed=1, dtype=torch.float64)
    assert x.shape == y.shape == (20, 4, 8)
    assert -1 <= float(x.min()) < float(x.max()) < 1
    assert_close(y.mean(-1), x.mean(-1))
    assert x.data_ptr() != y.data_ptr()
    if task is identity:
        assert torch.equal(x, y)
    else:
        assert_close(y, y[..., :1].expand_as(y))


def test_a_constant_scores_zero_and_a_wrong_one_less():
    _, y = FEYNMAN[0].draw(500, 0)
    assert abs(r_squared(y.mean().expand_as(y), y)) < 1e-6
    assert r_squared(y, y) == 1.0
    assert r_squared(torch.zeros_like(y), y) < 0
