"""Searchers of an `ArchSearchSpace` in one call: random, evolution, grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kizzasi.nas.searchers.ask_tell import Searcher, one_by_one, run
from kizzasi.nas.searchers.evolution import Evolution
from kizzasi.nas.searchers.grid import Grid
from kizzasi.nas.searchers.random import Random
from kizzasi.nas.spaces.families import ArchCandidate, ArchSearchSpace, proxy_scores


@dataclass(frozen=True)
class ArchSearchConfig:
    """How `RandomArchSearcher` and `EvolutionarySearcher` explore a space.

    Args:
        n_candidates: samples of the random searcher.
        n_generations: generations of evolution, each of `population_size` children.
        tournament_size: contestants for a parent's place.
        mutation_prob: chance per gene, 0 .. 1.
        population_size: members of the population.
        seed: 0 .. 2^64 - 1; 0 means 1.
    """

    n_candidates: int = 50
    n_generations: int = 20
    tournament_size: int = 5
    mutation_prob: float = 0.2
    population_size: int = 30
    seed: int = 42


@dataclass(frozen=True)
class ArchSearchResult:
    """The outcome of a search.

    Args:
        best_candidate: the one with the highest score, the last of equals.
        best_score: its score.
        all_candidates: every (candidate, score) in the order of evaluation.
        n_evaluations: how many.
    """

    best_candidate: ArchCandidate
    best_score: float
    all_candidates: Sequence[tuple[ArchCandidate, float]]
    n_evaluations: int


Evaluate = Callable[[ArchCandidate], float]


@dataclass(frozen=True)
class RandomArchSearcher:
    """Random search: `config.n_candidates` samples."""

    space: ArchSearchSpace
    config: ArchSearchConfig
    evaluate: Evaluate = ArchCandidate.proxy_score

    def search(self) -> ArchSearchResult:
        """Run it; SpecError if the space or the config breaks a rule."""
        searcher = Random(self.config.n_candidates, self.config.seed)
        return _search(searcher, self.space, self.evaluate)


@dataclass(frozen=True)
class EvolutionarySearcher:
    """Evolution: a random population, then `config.n_generations` of children."""

    space: ArchSearchSpace
    config: ArchSearchConfig
    evaluate: Evaluate = ArchCandidate.proxy_score

    def search(self) -> ArchSearchResult:
        """Run it; SpecError if the space or the config breaks a rule."""
        config = self.config
        searcher = Evolution(
            population_size=config.population_size,
            n_generations=config.n_generations,
            tournament_size=config.tournament_size,
            mutation_prob=config.mutation_prob,
            seed=config.seed,
        )
        return _search(searcher, self.space, self.evaluate)


@dataclass(frozen=True)
class GridSearcher:
    """Grid search: the first `max_candidates` combinations."""

    space: ArchSearchSpace
    max_candidates: int
    evaluate: Evaluate = ArchCandidate.proxy_score

    def search(self) -> ArchSearchResult:
        """Run it; SpecError if the space breaks a rule or the cap is below 1."""
        return _search(Grid(self.max_candidates), self.space, self.evaluate)


def search_best_arch(
    space: ArchSearchSpace,
    config: ArchSearchConfig,
    evaluate: Evaluate = ArchCandidate.proxy_score,
) -> ArchSearchResult:
    """Find a good architecture by evolution; `evaluate` scores one, higher is better."""
    return EvolutionarySearcher(space, config, evaluate).search()


def _search(searcher: Searcher, space: ArchSearchSpace, evaluate: Evaluate) -> ArchSearchResult:
    space.check()
    by_proxy = evaluate is ArchCandidate.proxy_score
    trials = run(searcher, space, proxy_scores if by_proxy else one_by_one(evaluate))
    best_candidate, best_score = trials.best()
    return ArchSearchResult(best_candidate, best_score, trials, len(trials))
