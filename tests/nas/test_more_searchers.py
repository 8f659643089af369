"""Regularised evolution, local search, NSGA-II and TPE: resumable, deterministic, and right."""

import itertools
import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kizzasi.errors import ShapeError, SpecError, StudyError
from kizzasi.nas import spaces
from kizzasi.nas.searchers import (
    NSGA2,
    TPE,
    AskTell,
    Flowing,
    Grid,
    LocalSearch,
    Random,
    RegularizedEvolution,
    one_by_one,
    pareto_front,
    run,
)
from kizzasi.nas.searchers.nsga2 import rank_and_crowding
from kizzasi.nas.spaces.rng import Xorshift64

seeds = st.integers(0, 2**64 - 1)


@dataclass(frozen=True)
class Digits:
    """Tuples of n digits below `base`."""

    n: int
    base: int

    @property
    def size(self):
        return self.base**self.n

    def build(self, decide):
        return tuple(decide(f"digit{i}", self.base) for i in range(self.n))

    def sample(self, rng):
        return self.build(lambda gene, n: rng.choice(range(n)))

    def mutate(self, candidate, rng, prob):
        options = range(self.base)
        return tuple(rng.choice(options) if rng.next_f64() < prob else d for d in candidate)

    def crossover(self, a, b, rng):
        return tuple(rng.choice(pair) for pair in zip(a, b, strict=True))

    def iterate(self, limit=None):
        return list(itertools.product(range(self.base), repeat=self.n))[:limit]

    def contains(self, candidate):
        return len(candidate) == self.n and all(0 <= d < self.base for d in candidate)


SPACE = Digits(5, 4)


def total(candidate):
    return float(sum(candidate))


def zdt1(candidate):
    """A discrete form of ZDT1: f2 = g (1 - sqrt(f1 / g)), whose front has g = 1."""
    f1 = candidate[0] / 3
    g = 1 + 9 * sum(candidate[1:]) / (3 * (len(candidate) - 1))
    return f1, g * (1 - math.sqrt(f1 / g))


def searchers(seed):
    return {
        "regularized": (RegularizedEvolution(6, 3, 30, 0.2, seed), total),
        "best": (LocalSearch(30, 5, "best", 0.2, seed), total),
        "first": (LocalSearch(30, 5, "first", 0.2, seed), total),
        "nsga2": (NSGA2(6, 4, 0.9, 0.2, seed), zdt1),
    }


NAMES = list(searchers(0))


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, cut=st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_a_search_is_its_history_and_seed(name, seed, cut):
    """Cut off and resumed, or asked piece by piece: the same trials, each new and inside."""
    searcher, score = searchers(seed)[name]
    whole = run(searcher, SPACE, one_by_one(score))
    evaluated = []

    def count(candidate):
        evaluated.append(candidate)
        return score(candidate)

    resumed = run(searcher, SPACE, one_by_one(count), history=whole[:cut])
    assert resumed == whole == list(whole)
    assert evaluated == [candidate for candidate, _ in whole[cut:]]
    pieces = AskTell(searcher, SPACE)
    while asked := pieces.ask(2):
        pieces.tell([score(candidate) for candidate in asked])
    assert pieces.history == whole
    candidates = [candidate for candidate, _ in whole]
    assert len(set(candidates)) == len(candidates) == 30
    assert all(map(SPACE.contains, candidates))


@pytest.mark.parametrize("name", NAMES)
def test_seeds_matter_and_failures_do_not_stop(name):
    searcher, score = searchers(3)[name]
    other, _ = searchers(2)[name]
    assert run(searcher, SPACE, one_by_one(score)) != run(other, SPACE, one_by_one(score))
    nan = (math.nan, math.nan) if name == "nsga2" else math.nan
    flaky = itertools.cycle([nan, None, nan])
    trials = run(searcher, SPACE, one_by_one(lambda c: next(flaky) or score(c)))
    assert len(trials) == 30


@pytest.mark.parametrize("name", NAMES)
def test_a_small_space_ends_the_search(name):
    searcher, score = searchers(4)[name]
    space = Digits(2, 3)
    trials = run(searcher, space, one_by_one(lambda c: score((*c, 0, 0, 0))))
    found = [candidate for candidate, _ in trials]
    assert len(found) == len(set(found))
    assert set(found) <= set(space.iterate())
    assert len(found) >= 6


# --- regularised evolution


@dataclass(frozen=True)
class Lineage(Digits):
    """Children are numbered and remember their parent."""

    def mutate(self, candidate, rng, prob):
        return (rng.next_u64(), candidate[0])


@given(seed=seeds, size=st.integers(1, 8), sample=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_regularized_evolution_ages_out_the_oldest(seed, size, sample):
    """However good the old are, a parent is one of the last P."""
    searcher = RegularizedEvolution(size, sample, 40, 0.1, seed)
    old_is_gold = itertools.count(0, -1)
    trials = run(searcher, Lineage(2, 10**6), one_by_one(lambda _: float(next(old_is_gold))))
    names = [candidate[0] for candidate, _ in trials]
    for i, (child, _) in enumerate(trials[size:], start=size):
        parents = names[i - size : i]
        assert child[1] in parents
        if sample >= size:  # the tournament is everyone: the best is the oldest alive
            assert child[1] == parents[0]


def test_regularized_evolution_climbs():
    space = Digits(20, 4)
    best = run(RegularizedEvolution(20, 5, 600, 0.05, 1), space, one_by_one(total)).best()[1]
    blind = run(Random(600, 1), space, one_by_one(total)).best()[1]
    assert best > 50 > blind


# --- local search


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_first_improvement_moves_at_once_and_best_looks_around(seed):
    sizes = {}
    for name in ("first", "best"):
        search = AskTell(searchers(seed)[name][0], SPACE)
        sizes[name] = []
        while batch := search.ask():
            sizes[name].append(len(batch))
            search.tell([total(c) for c in batch])
    assert set(sizes["first"]) == {1}
    assert sizes["best"][0] == 1
    assert max(sizes["best"]) == 5


def test_local_search_restarts_at_an_optimum():
    """With one neighbour per place and nothing ever better, every other trial is a new start."""
    starts = []

    @dataclass(frozen=True)
    class Watched(Digits):
        def sample(self, rng):
            starts.append(super().sample(rng))
            return starts[-1]

    flat = run(LocalSearch(10, 1, "first", 0.5, 3), Watched(9, 9), one_by_one(lambda _: 1.0))
    assert [candidate for candidate, _ in flat[::2]] == starts
    assert len(starts) == 5


@pytest.mark.parametrize("improvement", ["best", "first"])
def test_local_search_finds_the_top_of_a_hill(improvement):
    searcher = LocalSearch(400, 40, improvement, 0.1, seed=5)
    assert run(searcher, Digits(8, 4), one_by_one(total)).best()[1] == 24.0


def test_a_late_score_of_a_climb_that_is_over_leads_no_other():
    """With one neighbour a place, a new climb begins after one that is no better."""
    parents = []

    @dataclass(frozen=True)
    class Watched(Digits):
        def mutate(self, candidate, rng, prob):
            parents.append(candidate)
            return super().mutate(candidate, rng, prob)

    flow = Flowing(LocalSearch(9, 1, "first", 0.5, 3).stream(Watched(9, 9)))
    _, second = flow.propose(), flow.propose()
    flow.tell(1, 5.0)
    flow.propose()
    flow.tell(2, 1.0)
    fourth = flow.propose()
    flow.tell(0, 99.0)
    flow.tell(3, 2.0)
    flow.propose()
    assert parents == [second, fourth]


# --- NSGA-II


def brute_force_ranks(scores):
    """Peel fronts by definition, with loops."""

    def dominates(a, b):
        return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)

    left, ranks, level = set(range(len(scores))), {}, 0
    while left:
        front = {i for i in left if not any(dominates(scores[j], scores[i]) for j in left)}
        ranks.update(dict.fromkeys(front, level))
        left, level = left - front, level + 1
    return [ranks[i] for i in range(len(scores))]


values = st.sampled_from([0.0, 1.0, 2.0, 3.5, -1.0, math.inf])


@given(arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=values))
@settings(max_examples=150, deadline=None)
def test_ranks_agree_with_brute_force(scores):
    rank, crowding = rank_and_crowding(scores)
    assert rank.tolist() == brute_force_ranks(scores)
    assert (crowding >= 0).all()
    assert pareto_front(scores) == [i for i, r in enumerate(rank) if r == 0]


def test_crowding_by_hand():
    scores = [(0.0, 4.0), (1.0, 2.0), (2.0, 1.5), (4.0, 0.0)]
    _, crowding = rank_and_crowding(scores)
    assert crowding.tolist() == [math.inf, 2 / 4 + 2.5 / 4, 3 / 4 + 2 / 4, math.inf]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nsga2_finds_the_whole_front_of_a_toy(seed):
    space = Digits(5, 4)
    members = space.iterate()
    best = {zdt1(members[i]) for i in pareto_front([zdt1(c) for c in members])}
    assert best == {zdt1((digit, 0, 0, 0, 0)) for digit in range(4)}
    trials = run(NSGA2(16, 24, 0.9, 0.2, seed), space, one_by_one(zdt1))
    assert len(trials) < space.size / 2
    assert {trials.scores[i] for i in pareto_front(trials.scores)} == best


def test_scores_may_be_tuples():
    trials = run(NSGA2(4, 1, 0.9, 0.2, 1), SPACE, one_by_one(zdt1))
    assert all(isinstance(score, tuple) for _, score in trials)
    with pytest.raises(StudyError, match="pareto_front"):
        trials.best()
    with pytest.raises(ShapeError, match=r"give a tuple for each candidate"):
        run(NSGA2(4, 1, 0.9, 0.2, 1), SPACE, one_by_one(total))
    assert pareto_front([(math.nan, 0.0), (1.0, 1.0), (1.0, 1.0)]) == [0, 1, 2]


# --- TPE


def test_tpe_is_resumable_and_learns():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = TPE(40, 10, seed=2**63 + 5)
    whole = run(searcher, SPACE, one_by_one(total))
    assert run(searcher, SPACE, one_by_one(total), history=whole[:17]) == whole
    assert np.mean(whole.scores[25:]) > np.mean(whole.scores[:10]) + 1
    failing = run(TPE(12, 2, 1), SPACE, one_by_one(lambda c: math.nan if c[0] else total(c)))
    assert len(failing) == 12


def test_tpe_asks_for_conditional_genes():
    pytest.importorskip("optuna")
    space = spaces.tiny()
    trials = run(TPE(14, 6, seed=1), space, lambda b: [-c.spec.cost(8).params for c in b])
    assert all(space.contains(candidate) for candidate, _ in trials)


def test_tpe_gives_up_on_a_space_without_members():
    pytest.importorskip("optuna")

    class Void(Digits):
        def build(self, decide):
            super().build(decide)
            raise SpecError("void: nothing fits")

    with pytest.raises(SpecError, match="void: nothing fits"):
        run(TPE(4, 2, seed=1), Void(1, 2), one_by_one(total))


def test_tpe_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SpecError, match=r"pip install 'kizzasi-models\[optuna\]'"):
        run(TPE(4, 2, seed=1), SPACE, one_by_one(total))


# --- settings


@pytest.mark.parametrize(
    ("searcher", "name"),
    [
        (RegularizedEvolution(0, 1, 1, 0.1, 1), "population_size"),
        (RegularizedEvolution(1, 0, 1, 0.1, 1), "sample_size"),
        (RegularizedEvolution(1, 1, 0, 0.1, 1), "n_evaluations"),
        (RegularizedEvolution(1, 1, 1, 1.1, 1), "mutation_prob"),
        (LocalSearch(0, 1, "best", 0.1, 1), "n_evaluations"),
        (LocalSearch(1, 0, "best", 0.1, 1), "n_neighbours"),
        (LocalSearch(1, 1, "worst", 0.1, 1), "improvement"),  # pyright: ignore
        (LocalSearch(1, 1, "best", -0.1, 1), "mutation_prob"),
        (NSGA2(1, 1, 0.9, 0.1, 1), "population_size"),
        (NSGA2(2, -1, 0.9, 0.1, 1), "n_generations"),
        (NSGA2(2, 1, 2.0, 0.1, 1), "crossover_prob"),
        (NSGA2(2, 1, 0.9, math.nan, 1), "mutation_prob"),
        (TPE(0, 1, 1), "n_evaluations"),
        (TPE(1, 0, 1), "n_startup"),
    ],
)
def test_bad_settings_are_refused(searcher, name):
    with pytest.raises(SpecError, match=f"^{name}: "):
        run(searcher, SPACE, one_by_one(total))


def test_a_vector_history_resumes_and_a_grid_takes_tuples():
    whole = run(Grid(9), SPACE, one_by_one(zdt1))
    assert run(Grid(9), SPACE, one_by_one(zdt1), history=list(whole)[:4]) == whole
    assert SPACE.contains(SPACE.sample(Xorshift64(1)))


def test_tpe_is_told_what_the_space_refuses_and_can_always_be_asked():
    pytest.importorskip("optuna")
    refused: list[bool] = []

    class Even(Digits):
        def build(self, decide):
            candidate = super().build(decide)
            refused.append(candidate[0] % 2 == 1)
            if refused[-1]:
                raise SpecError("odd")
            return candidate

    stream = Flowing(TPE(60, 5, seed=3).stream(Even(3, 6)))
    first = [stream.propose() for _ in range(4)]  # four workers begin
    assert None not in first
    numbers = iter(range(60))
    for candidate in first:
        stream.tell(next(numbers), sum(candidate))
    stream.tell(0, 99.0)  # trained further
    while (candidate := stream.propose()) is not None:
        stream.tell(next(numbers), sum(candidate))
    assert stream.over
    n = len(refused) // 2
    assert sum(refused[n:]) < 0.6 * sum(refused[:n])
