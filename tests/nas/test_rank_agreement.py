"""Rank statistics against hand-computed cases and scipy; verdicts on proxies of known worth."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kizzasi.errors import ShapeError, SpecError
from kizzasi.nas.results.rank_agreement import (
    kendall_tau_b,
    proxy_agreement,
    spearman,
    top_k_recall,
)

NAN, INF = math.nan, math.inf


def close(value):
    return pytest.approx(value, rel=0, abs=1e-12)


def test_by_hand():
    assert spearman([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0 == kendall_tau_b([1, 2, 3], [4, 5, 6])
    assert spearman([1, 2, 3], [3, 2, 1]) == -1.0 == kendall_tau_b([1, 2, 3], [3, 2, 1])
    # ranks differ by (1, 1, 0, 0): 1 - 6 * 2 / (4 * 15); one pair of six is discordant
    assert spearman([1, 2, 3, 4], [2, 1, 3, 4]) == close(0.8)
    assert kendall_tau_b([1, 2, 3, 4], [2, 1, 3, 4]) == close(4 / 6)
    # one tie in x: 5 concordant pairs, 6 - 1 untied in x, 6 in y; ranks 1.5 1.5 3 4
    assert kendall_tau_b([1, 1, 2, 3], [1, 2, 3, 4]) == close(5 / math.sqrt(5 * 6))
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == close(4.5 / math.sqrt(4.5 * 5))
    assert spearman([-INF, 0, INF], [1, 2, 3]) == 1.0


def test_recall_by_hand():
    truth = [10, 9, 8, 7, 6]
    assert top_k_recall(truth, truth, 2) == 1.0
    assert top_k_recall([1, 2, 3, 4, 5], truth, 2) == 0.0
    assert top_k_recall([5, 1, 4, 3, 2], truth, 2) == 0.5
    # the second place is shared by two: half of the second best is found
    assert top_k_recall([5, 4, 4, 1, 1], truth, 2) == close(0.75)
    assert top_k_recall([5, 5, 4, 4, 1], [5, 5, 4, 4, 1], 3) == 1.0


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0], [1.0]),
        ([1, 2], [1, 2]),
        ([1, 1, 1], [1, 2, 3]),
        ([1, 2, 3], [7, 7, 7]),
        ([1, 2, NAN], [1, 2, 3]),
        ([1, 2, 3], [1, None, 3]),
    ],
)
def test_degenerate_scores_are_not_defined(x, y):
    assert spearman(x, y) is kendall_tau_b(x, y) is top_k_recall(x, y, 1) is None


def test_recall_of_everything_is_not_defined():
    assert top_k_recall([1, 2, 3], [1, 2, 3], 3) is None


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match=r"x \(2,\), y \(3,\)"):
        spearman([1, 2], [1, 2, 3])
    with pytest.raises(SpecError, match="k: 0"):
        top_k_recall([1, 2, 3], [1, 2, 3], 0)
    with pytest.raises(ShapeError, match=r"in_band \(1,\)"):
        proxy_agreement([1, 2, 3], [1, 2, 3], [1, 2, 3], [True])
    with pytest.raises(SpecError, match="n_boot: 0"):
        proxy_agreement([1], [1], [1], [True], n_boot=0)


few_values = st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6)
pairs = st.lists(st.tuples(few_values, few_values), min_size=3, max_size=40)


@pytest.fixture(scope="module")
def stats():
    return pytest.importorskip("scipy.stats", reason="scipy is not installed")


@given(rows=pairs)
@settings(deadline=None)
def test_correlations_equal_scipy(stats, rows):
    x, y = np.array(rows).T
    if spearman(x, y) is None:
        assert len(set(x)) == 1 or len(set(y)) == 1
        return
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-9)


@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(1, 11))
@settings(deadline=None)
def test_recall_without_ties_is_an_overlap_of_sets(x, y, k):
    def best(scores):
        return set(np.argsort(scores)[-k:].tolist())

    assert top_k_recall(x, y, k) == close(len(best(x) & best(y)) / k)


def test_bootstrap_equals_resampling_by_hand():
    """The weighted statistics of a resample are the plain ones of the resampled lists."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 6, 15), rng.normal(size=15)
    rows = np.random.default_rng(8).multinomial(15, np.full(15, 1 / 15), size=200)
    resamples = [np.repeat(np.arange(15), row) for row in rows]
    report = proxy_agreement(x, y, np.arange(15), np.ones(15), seed=8, n_boot=200, k=4)
    for statistic, by_hand in (
        (report.everywhere.proxy.spearman, spearman),
        (report.everywhere.proxy.kendall_tau_b, kendall_tau_b),
    ):
        low, high = np.quantile([by_hand(x[i], y[i]) for i in resamples], [0.025, 0.975])
        assert statistic.value == by_hand(x, y)
        assert (statistic.low, statistic.high) == (close(low), close(high))
    perfect = proxy_agreement(y, y, x, np.ones(15), k=4).everywhere.proxy
    for statistic in (perfect.spearman, perfect.kendall_tau_b, perfect.top_k_recall):
        assert (statistic.value, statistic.low, statistic.high) == close((1.0, 1.0, 1.0))


def trained_candidates(n=60):
    rng = np.random.default_rng(0)
    trained, noise = rng.normal(size=(2, n))
    return trained, noise, np.arange(n) < n // 2


def test_a_good_proxy_beats_the_baselines():
    trained, noise, in_band = trained_candidates()
    report = proxy_agreement(trained + 0.1 * noise, trained, noise, in_band, n_boot=300)
    claim = "the proxy beats a random ranking and beats parameter count only"
    assert report.verdict.count(claim) == 2
    assert (report.everywhere.n, report.in_band.n, report.n_dropped) == (60, 30, 0)
    chance = report.everywhere.random
    assert (chance.kendall_tau_b.value, chance.top_k_recall.value) == (0.0, 5 / 60)
    assert chance.kendall_tau_b.low < 0 < chance.kendall_tau_b.high < 0.3


def test_a_bad_proxy_loses_in_words():
    trained, noise, in_band = trained_candidates()
    report = proxy_agreement(-trained, trained, trained + 0.1 * noise, in_band, n_boot=300)
    claim = "the proxy loses to a random ranking and loses to parameter count only"
    assert report.verdict.count(claim) == 2


def test_an_idle_proxy_ties():
    trained, noise, in_band = trained_candidates()
    report = proxy_agreement(noise, trained, noise, in_band, n_boot=300)
    claim = "the proxy ties with a random ranking and ties with parameter count only"
    assert report.verdict.count(claim) == 2
    lead = report.everywhere.lead
    assert (lead.value, lead.low, lead.high) == (0.0, 0.0, 0.0)


def test_worth_without_enough_candidates_is_said_to_be_undefined():
    """Seven in perfect agreement are no certainty: 1.00 [1.00, 1.00] would be a false one."""
    seven, eight = range(7), range(8)
    report = proxy_agreement([*seven, NAN], eight, eight, [1, 1, 0, 1, 1, 0, 1, 1], n_boot=50)
    assert report.n_dropped == 1
    assert "Inside the parameter band the worth of the proxy is not defined (5" in report.verdict
    assert "(7 candidates; it takes 8" in report.verdict
    assert report.everywhere.proxy.spearman.value is None
    report = proxy_agreement([1] * 8, eight, [5] * 8, [1] * 8, n_boot=50)
    assert report.in_band.proxy.spearman.value is None
    assert report.everywhere.parameters.kendall_tau_b.value is None
    same = proxy_agreement(eight, eight, eight, [1] * 8, n_boot=50)
    assert same.in_band.proxy.spearman.value == 1


def test_a_report_is_plain_data_and_repeats_with_its_seed():
    trained, noise, in_band = trained_candidates()
    first, second, other = (
        proxy_agreement(noise, trained, trained, in_band, n_boot=100, seed=seed).to_dict()
        for seed in (1, 1, 2)
    )
    assert first == second == json.loads(json.dumps(first))
    assert first["everywhere"]["proxy"] != other["everywhere"]["proxy"]
    assert first["verdict"].startswith("Inside the parameter band the proxy ")


def test_spearman_of_very_many_takes_no_pairs():
    """A report of a search of ten thousand asks for it; by pairs that would be a gigabyte."""
    x = np.random.default_rng(0).integers(0, 9, 300)
    y = np.random.default_rng(1).integers(0, 9, 300)
    by_pairs = proxy_agreement(x, y, x, np.ones(300), n_boot=1).everywhere.proxy.spearman.value
    assert spearman(x, y) == by_pairs
    assert spearman(np.arange(200_000), np.arange(200_000) // 2) == pytest.approx(1, abs=1e-9)
