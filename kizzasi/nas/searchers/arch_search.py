"""Searchers of an `ArchSearchSpace` in one call: random, evolution, grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from kizzasi.errors import DataError, SpecError
from kizzasi.models import ModelSpec
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


@runtime_checkable
class Trains(Protocol):
    """An evaluator of models, such as a `MicroTrain`."""

    def model_of(self, candidate: ArchCandidate) -> ModelSpec:
        """The model to train. Raises SpecError where genes do not fit each other."""
        ...

    def fitness(self, spec: ModelSpec) -> float:
        """Train it and return its score, higher is better. Raises where the training fails."""
        ...


@dataclass(frozen=True)
class Trained:
    """A candidate that was trained, or could not be.

    Args:
        candidate: its genes.
        params: of the real model; None if the genes make none.
        proxy: its analytic score.
        score: higher is better; -inf if it failed.
        failure: why, or None.
    """

    candidate: ArchCandidate
    params: int | None
    proxy: float
    score: float
    failure: str | None = None


@dataclass(frozen=True)
class ArchSearchResult:
    """The outcome of a search.

    Args:
        best_candidate: the one with the highest score, the last of equals.
        best_score: its score.
        all_candidates: every (candidate, score) in the order of evaluation.
        n_evaluations: how many.
        trained: everyone who was trained, each model once; () without a training.
    """

    best_candidate: ArchCandidate
    best_score: float
    all_candidates: Sequence[tuple[ArchCandidate, float]]
    n_evaluations: int
    trained: tuple[Trained, ...] = ()

    @property
    def correlations(self) -> dict[str, float | None]:
        """Kendall's tau-b of the analytic proxy, and of the parameter count alone, with the trained
        scores; failures are the worst. None where all are equal."""
        sized = [one for one in self.trained if one.params is not None]
        scores = [one.score for one in sized]
        return {
            "proxy": _tau_b([one.proxy for one in sized], scores),
            "params": _tau_b([float(one.params or 0) for one in sized], scores),
        }

    @property
    def table(self) -> str:
        """Everyone who was trained, best first, as text."""
        lines = [f"{'score':>10}  {'proxy':>7}  {'params':>12}  candidate"]
        for one in sorted(self.trained, key=lambda one: -one.score):
            shown = "failed" if one.failure else f"{one.score:.4f}"
            params = "-" if one.params is None else f"{one.params:,}"
            lines.append(f"{shown:>10}  {one.proxy:7.4f}  {params:>12}  {one.candidate.name}")
        return "\n".join(lines)


Evaluate = Callable[[ArchCandidate], float]


@dataclass(frozen=True)
class RandomArchSearcher:
    """Random search: `config.n_candidates` samples."""

    space: ArchSearchSpace
    config: ArchSearchConfig
    evaluate: Evaluate | Trains = ArchCandidate.proxy_score

    def search(self, evaluate: Evaluate | Trains | None = None) -> ArchSearchResult:
        """Run it, with this evaluator or the own one; SpecError if the space or the config breaks a
        rule. A `MicroTrain` trains each model once, and one that fails is the worst."""
        searcher = Random(self.config.n_candidates, self.config.seed)
        return _search(searcher, self.space, evaluate or self.evaluate)


@dataclass(frozen=True)
class EvolutionarySearcher:
    """Evolution: a random population, then `config.n_generations` of children."""

    space: ArchSearchSpace
    config: ArchSearchConfig
    evaluate: Evaluate | Trains = ArchCandidate.proxy_score

    def search(self, evaluate: Evaluate | Trains | None = None) -> ArchSearchResult:
        """Run it, as `RandomArchSearcher.search` does."""
        config = self.config
        searcher = Evolution(
            population_size=config.population_size,
            n_generations=config.n_generations,
            tournament_size=config.tournament_size,
            mutation_prob=config.mutation_prob,
            seed=config.seed,
        )
        return _search(searcher, self.space, evaluate or self.evaluate)


@dataclass(frozen=True)
class GridSearcher:
    """Grid search: the first `max_candidates` combinations."""

    space: ArchSearchSpace
    max_candidates: int
    evaluate: Evaluate | Trains = ArchCandidate.proxy_score

    def search(self, evaluate: Evaluate | Trains | None = None) -> ArchSearchResult:
        """Run it, as `RandomArchSearcher.search` does; SpecError if the cap is below 1."""
        return _search(Grid(self.max_candidates), self.space, evaluate or self.evaluate)


def search_best_arch(
    space: ArchSearchSpace,
    config: ArchSearchConfig,
    evaluate: Evaluate | Trains = ArchCandidate.proxy_score,
) -> ArchSearchResult:
    """Find a good architecture by evolution; `evaluate` scores one, higher is better."""
    return EvolutionarySearcher(space, config, evaluate).search()


def _search(
    searcher: Searcher, space: ArchSearchSpace, evaluate: Evaluate | Trains
) -> ArchSearchResult:
    space.check()
    if isinstance(evaluate, Trains):
        trainings = _Trainings(evaluate)
        trials = run(searcher, space, one_by_one(trainings))
        best_candidate, best_score = trials.best()
        trained = tuple(trainings.known.values())
        return ArchSearchResult(best_candidate, best_score, trials, len(trials), trained)
    by_proxy = evaluate is ArchCandidate.proxy_score
    trials = run(searcher, space, proxy_scores if by_proxy else one_by_one(evaluate))
    best_candidate, best_score = trials.best()
    return ArchSearchResult(best_candidate, best_score, trials, len(trials))


class _Trainings:
    """Scores candidates by training, each model once; a failure is a score like any other."""

    def __init__(self, evaluator: Trains) -> None:
        self.evaluator = evaluator
        self.known: dict[ModelSpec | ArchCandidate, Trained] = {}

    def __call__(self, candidate: ArchCandidate) -> float:
        try:
            spec: ModelSpec | None = self.evaluator.model_of(candidate)
        except SpecError as error:
            misfit = Trained(candidate, None, candidate.proxy_score(), -math.inf, str(error))
            return self.known.setdefault(candidate, misfit).score
        if spec not in self.known:
            self.known[spec] = self._trained(candidate, spec)
        return self.known[spec].score

    def _trained(self, candidate: ArchCandidate, spec: ModelSpec) -> Trained:
        params, proxy = spec.cost(1).params, candidate.proxy_score()
        try:
            return Trained(candidate, params, proxy, self.evaluator.fitness(spec))
        except (DataError, OSError):
            raise  # no fault of the candidate
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Trained(candidate, params, proxy, -math.inf, reason)


def _tau_b(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's rank correlation, corrected for ties; None where one side is all ties."""
    ranks = [np.unique(np.array(side, float), return_inverse=True)[1] for side in (x, y)]
    s_x, s_y = (np.sign(rank[:, None] - rank).astype(float) for rank in ranks)
    scale = math.sqrt((s_x**2).sum() * (s_y**2).sum())
    return float((s_x * s_y).sum() / scale) if scale else None
