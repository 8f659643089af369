"""The exams of spaces, searchers and schedulers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from kizzasi.nas.schedulers import Results, Schedule, Scheduler
from kizzasi.nas.schedulers.schedule import FAILED
from kizzasi.nas.searchers import AskTell, Grid, Searcher
from kizzasi.nas.spaces.describe import spec_of
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Combinations, Space
from kizzasi.nas.spaces.stem import Stem

DRAWS = 20
MOST = 2000  # candidates of a searcher that is examined


def check_space(space: Space[Any], stem: Stem | None = None) -> None:
    """Members that are models, moves that draw all their chance from `rng` and stay inside.

    Args:
        space: yours.
        stem: of the task, for candidates that name none.
    """
    once, again = (_moves(space, Xorshift64(7)) for _ in range(2))
    assert once == again, "moves: the same random numbers make other candidates"
    for candidate in once:
        assert space.contains(candidate), f"moves: {candidate!r:.80} is outside the space"
        spec_of(candidate, stem).check()
    rng = Xorshift64(3)
    for candidate in once[:DRAWS]:
        same = space.mutate(candidate, rng, 0.0)
        assert same == candidate, "mutate: a chance of 0 changes the candidate"
        assert space.crossover(candidate, candidate, rng) == candidate, "crossover of one parent"
    changed = [space.mutate(once[0], rng, 1.0) for _ in range(DRAWS)]
    assert len({*changed, once[0]}) > 1 or space.size < 2, "mutate: nothing ever changes"
    listed = list(space.iterate(DRAWS))
    assert 0 < len(listed) <= min(DRAWS, space.size), "iterate: not as many as asked for"
    assert len(set(listed)) == len(listed), "iterate: a candidate stands twice"
    assert all(map(space.contains, listed)), "iterate: a candidate is outside the space"
    assert space.contains(space.build(lambda gene, n: n - 1)), "build: outside the space"


def _moves(space: Space[Any], rng: Xorshift64) -> list[Any]:
    drawn = [space.sample(rng) for _ in range(DRAWS)]
    mutants = [space.mutate(candidate, rng, 0.5) for candidate in drawn]
    return [*drawn, *mutants, *(space.crossover(a, b, rng) for a, b in zip(drawn, mutants))]  # noqa: B905


def check_searcher(searcher: Searcher, space: Space[Any]) -> None:
    """Batches that are a function of the seed and of the scores sent back, and end.

    Args:
        searcher: yours, with less than 2,000 candidates.
        space: some space.
    """
    once, again = (_proposed(searcher, space, 1) for _ in range(2))
    assert once == again, "proposals: equal scores lead to other candidates"
    assert once, "proposals: there is none"
    for candidate in once:
        assert space.contains(candidate), f"proposals: {candidate!r:.80} is outside the space"
    _proposed(searcher, space, 2, failures=True)


def _proposed(
    searcher: Searcher, space: Space[Any], seed: int, *, failures: bool = False
) -> list[Any]:
    chance, search, found = random.Random(seed), AskTell(searcher, space), list[Any]()
    while batch := search.ask():
        found += batch
        assert len(found) <= MOST, f"proposals: no end after {MOST} candidates"
        scores = [chance.random() for _ in batch]
        search.tell([-math.inf if failures and s < 0.3 else s for s in scores])
    return found


@dataclass(frozen=True)
class _Numbers:
    """A space of numbers, for schedulers, which do not look at candidates."""

    n: int

    @property
    def size(self) -> int:
        return self.n

    def sample(self, rng: Xorshift64) -> int:
        return rng.choice(range(self.n))

    def build(self, decide: Any) -> int:
        return decide("n", self.n)

    def mutate(self, candidate: int, rng: Xorshift64, prob: float) -> int:
        return self.sample(rng) if rng.next_f64() < prob else candidate

    def crossover(self, a: int, b: int, rng: Xorshift64) -> int:
        return rng.choice((a, b))

    def iterate(self, limit: int | None = None) -> Combinations[int]:
        return Combinations(int, (range(self.n),), range(self.n)[:limit])

    def contains(self, candidate: int) -> bool:
        return 0 <= candidate < self.n


def check_scheduler(scheduler: Scheduler, n_candidates: int = 30) -> None:
    """Rising budgets, decisions that are a function of the results, and an end in any order.

    Args:
        scheduler: yours.
        n_candidates: that a searcher would have for it.
    """
    scheduler.check()
    for candidate in range(n_candidates):
        budgets = scheduler.budgets(candidate)
        rising = all(a < b for a, b in zip((0, *budgets), budgets))  # noqa: B905
        assert rising, f"budgets: {budgets} of candidate {candidate} do not rise from above 0"
    for workers in (1, 4):
        for failures in (0.0, 0.3):
            _scheduled(scheduler, n_candidates, workers, failures)


def _scheduled(scheduler: Scheduler, n: int, workers: int, failures: float) -> None:
    chance = random.Random(workers)
    schedule = Schedule(scheduler, AskTell(Grid(n), _Numbers(n)))
    running: list[Any] = []
    copy = Results()
    while True:
        running += schedule.ask(workers - len(running))
        if not running:
            break
        job = running.pop(chance.randrange(len(running)))
        score = None if chance.random() < failures else chance.random()
        schedule.tell(job, score)
        copy.add(job.candidate, FAILED if score is None else score)
        copy.n_candidates = schedule.results.n_candidates
        going_on = list(scheduler.survivors(schedule.results))
        assert going_on == list(scheduler.survivors(copy)), "survivors: not a function of results"
        for candidate in going_on:
            scores = schedule.results.scores(candidate)
            assert FAILED not in scores, f"survivors: candidate {candidate} has failed"
            assert len(scores) < len(scheduler.budgets(candidate)), "survivors: nothing is left"
    trained = {candidate for candidate, _, _ in schedule.results.told}
    wanted = {candidate for candidate in range(n) if scheduler.budgets(candidate)}
    assert trained == wanted, f"the study ended, and {len(wanted - trained)} were never trained"
