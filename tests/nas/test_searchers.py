"""The general searchers: chance, spaces, ask and tell; a search is its history and seed."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kizzasi.errors import SpecError, StudyError
from kizzasi.nas.searchers import AskTell, Evolution, Grid, History, Random, one_by_one, run
from kizzasi.nas.spaces.families import ArchCandidate, ArchSearchSpace, proxy_scores
from kizzasi.nas.spaces.rng import Xorshift64

SPACE = ArchSearchSpace()
EVOLUTION = Evolution(
    population_size=6, n_generations=4, tournament_size=3, mutation_prob=0.2, seed=11
)
SEARCHERS = [Random(30, seed=5), Grid(30), EVOLUTION]

seeds = st.integers(0, 2**64 - 1)


@dataclass(frozen=True)
class BitStrings:
    """A second space, of tuples of bits, to show that searchers know nothing of architectures."""

    n_bits: int

    @property
    def size(self):
        return 2**self.n_bits

    def sample(self, rng):
        return tuple(rng.choice((0, 1)) for _ in range(self.n_bits))

    def mutate(self, candidate, rng, prob):
        return tuple(1 - bit if rng.next_f64() < prob else bit for bit in candidate)

    def crossover(self, a, b, rng):
        cut = rng.choice(range(self.n_bits + 1))
        return a[:cut] + b[cut:]

    def iterate(self, limit=None):
        numbers = range(self.size)[:limit]
        return [tuple(n >> i & 1 for i in range(self.n_bits)) for n in numbers]

    def contains(self, candidate):
        return len(candidate) == self.n_bits and set(candidate) <= {0, 1}


def options(values):
    return st.lists(values, min_size=1, max_size=3, unique=True).map(tuple)


sizes = options(st.integers(1, 64))
arch_spaces = st.builds(
    ArchSearchSpace,
    d_model_options=sizes,
    d_state_options=sizes,
    n_layers_options=sizes,
    model_types=options(st.sampled_from(["mamba", "rwkv", "s4", "transformer", "other"])),
    expand_factor_options=options(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 4.0])),
    dropout_options=options(st.sampled_from([0.0, 0.1, 0.2, 0.5])),
)
spaces = arch_spaces | st.builds(BitStrings, st.integers(1, 8))


# --- chance


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", True, None])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(SpecError, match="seed: "):
        Xorshift64(seed)


def test_seed_zero_means_one():
    assert Xorshift64(0).next_u64() == Xorshift64(1).next_u64()


def test_choice_from_nothing_is_refused():
    with pytest.raises(SpecError, match="no options"):
        Xorshift64(1).choice([])


@given(seed=seeds, n=st.integers(0, 20))
@settings(deadline=None)
def test_chance_stays_in_range(seed, n):
    rng = Xorshift64(seed)
    assert 0 < rng.next_u64() < 2**64
    assert 0.0 <= rng.next_f64() < 1.0
    items = list(range(n))
    rng.shuffle(items)
    assert sorted(items) == list(range(n))
    if n:
        assert rng.choice(items) in items


# --- spaces


@given(space=spaces, seed=seeds, prob=st.floats(0, 1))
@settings(deadline=None)
def test_moves_stay_in_the_space(space, seed, prob):
    rng = Xorshift64(seed)
    a, b = space.sample(rng), space.sample(rng)
    child = space.crossover(a, b, rng)
    mutant = space.mutate(child, rng, prob)
    assert all(space.contains(candidate) for candidate in (a, b, child, mutant))
    assert space.mutate(a, rng, 0.0) == a


@given(space=spaces)
@settings(max_examples=50, deadline=None)
def test_iterate_lists_the_space_once(space):
    members = list(space.iterate())
    assert len(members) == len(set(members)) == len(space.iterate()) == space.size
    assert all(map(space.contains, members))
    assert list(space.iterate(5)) == members[:5]


@given(space=arch_spaces, seed=seeds)
@settings(deadline=None)
def test_genes_come_from_the_parents(space, seed):
    rng = Xorshift64(seed)
    a, b = space.sample(rng), space.sample(rng)
    child = vars(space.crossover(a, b, rng))
    assert all(child[gene] in (vars(a)[gene], vars(b)[gene]) for gene in child)


@given(space=arch_spaces, seed=seeds)
@settings(deadline=None)
def test_a_lazy_grid_is_a_sequence(space, seed):
    rng = Xorshift64(seed)
    grid, members = space.iterate(), list(space.iterate())
    bounds = range(-len(members) - 1, len(members) + 2)
    part = slice(rng.choice(bounds), rng.choice(bounds), rng.choice((None, 1, 3, -1, -2)))
    assert list(grid[part]) == members[part]
    assert list(reversed(grid)) == members[::-1]
    assert grid[-1] == members[-1]
    assert proxy_scores(grid[part]).tolist() == [c.proxy_score() for c in members[part]]
    with pytest.raises(IndexError):
        grid[len(members)]


def test_a_stranger_is_not_contained():
    assert not SPACE.contains(ArchCandidate(65, 8, 2, "mamba", 1.0, 0.0))


# --- searches


def score_bits(bits):
    return float(sum(bits))


@pytest.mark.parametrize("searcher", SEARCHERS, ids=lambda s: type(s).__name__)
@given(cut=st.integers(0, 30), seed=seeds)
@settings(max_examples=15, deadline=None)
def test_a_search_is_its_history_and_seed(searcher, cut, seed):
    """One by one, in odd pieces, by the batch, or cut off and resumed: the same trials."""
    whole = run(searcher, SPACE, proxy_scores)
    rng = Xorshift64(seed)
    pieces = AskTell(searcher, SPACE)
    while asked := pieces.ask(rng.choice((1, 2, 5))):
        told = asked[: rng.choice(range(1, len(asked) + 1))]
        pieces.tell([candidate.proxy_score() for candidate in told])
    evaluated = []

    def count(candidate):
        evaluated.append(candidate)
        return candidate.proxy_score()

    resumed = run(searcher, SPACE, one_by_one(count), history=whole[:cut])
    assert whole == pieces.history == resumed == list(whole)
    assert evaluated == [candidate for candidate, _ in whole[cut:]]


@pytest.mark.parametrize("searcher", [Random(200, seed=3), Grid(10**6), EVOLUTION])
def test_searchers_run_over_any_space(searcher):
    space = BitStrings(5)
    history = run(searcher, space, one_by_one(score_bits))
    assert all(space.contains(candidate) for candidate, _ in history)
    assert history.best()[1] == max(map(score_bits, space.iterate())) == 5.0


def test_evolution_climbs():
    searcher = Evolution(
        population_size=20, n_generations=30, tournament_size=5, mutation_prob=0.05, seed=1
    )
    best = run(searcher, BitStrings(40), one_by_one(score_bits)).best()[1]
    blind = run(Random(620, seed=1), BitStrings(40), one_by_one(score_bits)).best()[1]
    assert best == 40.0 > blind


@pytest.mark.parametrize("tournament_size", [0, 1, 10**6])
def test_tournaments_are_clipped_to_the_population(tournament_size):
    searcher = Evolution(1, 3, tournament_size, mutation_prob=1.0, seed=2)
    assert len(run(searcher, SPACE, proxy_scores)) == 4


def test_asking_twice_is_asking_once():
    search = AskTell(Random(4, seed=9), SPACE)
    assert search.ask(2) == search.ask(3)[:2] == search.ask()[:2]
    search.tell([1.0, 2.0, 3.0, 4.0])
    assert search.ask() == search.ask(1) == ()
    with pytest.raises(StudyError, match="1 scores, but 0 candidates"):
        search.tell([1.0])


@pytest.mark.parametrize("scores", [[], [1.0] * 5])
def test_tell_refuses_too_few_or_too_many(scores):
    search = AskTell(Random(4, seed=9), SPACE)
    search.ask()
    with pytest.raises(StudyError, match=f"tell: {len(scores)} scores, but 4 candidates"):
        search.tell(scores)


def test_a_foreign_history_is_refused():
    history = run(Random(8, seed=1), SPACE, proxy_scores)
    with pytest.raises(StudyError, match=r"trial 0 is .*searcher, seed and space"):
        run(Random(8, seed=2), SPACE, proxy_scores, history)
    with pytest.raises(StudyError, match=r"trial 5 is .*nothing more"):
        run(Random(5, seed=1), SPACE, proxy_scores, history)


def test_ties_go_to_the_last_and_nan_never_wins():
    space = BitStrings(3)
    scores = iter([math.nan, 2.0, 1.0, 2.0, -math.inf, 1.0, math.nan, math.nan])
    history = run(Grid(8), space, one_by_one(lambda _: next(scores)))
    assert history.best() == history[3]
    assert math.isnan(history[-1][1])


def test_evolution_replaces_failed_trials():
    """Founders that all failed (NaN) give way to children, which then improve."""
    searcher = Evolution(
        population_size=10, n_generations=40, tournament_size=3, mutation_prob=0.05, seed=4
    )
    failures = iter([math.nan] * 10)

    def fragile(bits):
        return next(failures, score_bits(bits))

    assert run(searcher, BitStrings(20), one_by_one(fragile)).best()[1] == 20.0


def test_histories_differ_from_other_things():
    history = run(Grid(2), SPACE, proxy_scores)
    assert history != run(Grid(3), SPACE, proxy_scores)
    assert history != 3
    assert History() == []
