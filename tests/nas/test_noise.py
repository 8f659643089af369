"""The noise floor: a search whose finalists are all alike seldom calls one of them better."""

import numpy as np
import pytest
from scipy import stats

from kizzasi.nas.results.finals import Final
from kizzasi.nas.results.noise import noise_of, t_quantile


def final(name: str, scores, windows=None) -> Final:
    trials = tuple({"seed": s, "score": float(y)} for s, y in enumerate(scores))
    tests = trials
    if windows is not None:
        tests = tuple({**t, "values": [float(v) for v in windows]} for t in trials)
    return Final({"id": name}, trials, tests if windows is not None else ())


@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_the_best_of_several_equals_is_ahead_in_at_most_5_percent(k):
    """k finalists and a preset, 3 seeds, no true difference: the best of the k against it."""
    rng, ahead, n = np.random.default_rng(k), 0, 2000
    for _ in range(n):
        y = rng.normal(2, 0.02, (k + 1, 3)) + rng.normal(0, 0.05, 3)
        finals = [final(str(i), row) for i, row in enumerate(y)]
        best = min(finals[1:], key=lambda f: f.mean)
        noise = noise_of(finals)
        ahead += noise.gap(best, finals[0]) > noise.floor
    assert ahead / n <= 0.05
    assert ahead / n > 0.003, "the floor is so high that nothing is ever told apart"


def test_quantiles_of_students_t():
    table = {(0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 10): 2.2281, (0.95, 5): 2.0150}
    for (p, freedom), value in {**table, (0.995, 30): 2.7500, (0.9975, 4): 5.5976}.items():
        assert t_quantile(p, freedom) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("freedom", [*range(1, 13), 1_001, 50_000])
def test_quantiles_are_those_of_scipy(freedom):
    for p in (0.6, 0.975, 0.9995):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9)


def test_windows_that_differ_make_the_floor_higher():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2, 0.3, (2, 400))
    alike = [final("a", [2.0, 2.01, 2.02], a), final("b", [2.1, 2.11, 2.12], a + 0.1)]
    apart = [final("a", [2.0, 2.01, 2.02], a), final("b", [2.1, 2.11, 2.12], b + 0.1)]
    assert noise_of(alike).sampling < 1e-9
    assert noise_of(apart).sampling == pytest.approx(0.3 * np.sqrt(2 / 400), rel=0.25)
    assert noise_of(apart).floor > 1.9 * noise_of(apart).sampling
    slow = np.repeat(rng.normal(2, 0.3, 50), 8)  # neighbours alike: fewer independent windows
    blocks = [final("a", [2.0, 2.01], slow), final("b", [2.0, 2.01], np.full(400, 2.0))]
    assert noise_of(blocks).sampling > 1.7 * 0.3 / np.sqrt(400)
