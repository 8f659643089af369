"""Ask and tell for training in instalments: who trains on, up to which budget.

A scheduler is a pure function of the results in the order they were told. A `Schedule` joins it
with a searcher, which proposes the candidates, and with any number of workers.

Glossary
    candidate   its number, in the order in which the searcher proposed it
    budget      steps (or tokens) trained on in all, earlier instalments included
    rung        place of a budget among the budgets of its candidate, from 0
    score       of a candidate at a budget, higher is better
    FAILED      the score of a training that crashed or diverged
    eta         reduction factor: about one in eta goes on
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from kizzasi.errors import StudyError
from kizzasi.nas.searchers.ask_tell import AskTell, require_at_least
from kizzasi.nas.searchers.stream import Flowing

C = TypeVar("C")
S = TypeVar("S")
Told: TypeAlias = tuple[int, int, float]  # candidate, rung, score
Curve: TypeAlias = "Sequence[tuple[float, float | None]]"  # (budget, training loss) pairs

FAILED = -math.inf


@dataclass(frozen=True)
class Instalment:
    """Train a candidate from where its checkpoint is (from scratch if none) up to a budget."""

    candidate: int
    budget: int


class Results:
    """What has been told, and nothing else: all that a scheduler may look at.

    Attributes:
        told: (candidate, rung, score) in the order told.
        n_candidates: how many candidates there are; None while the searcher may have more.
        n_begun: one more than the last candidate with a score.
        settled: notes of schedulers on what no later result can change.
    """

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.n_candidates: int | None = None
        self.n_begun = 0
        self.settled: dict[Hashable, Any] = {}
        self._rungs: list[dict[int, float]] = []
        self._orders: list[list[tuple[float, int]]] = []
        self._resting: list[list[tuple[float, int]]] = []
        self._scores: dict[int, list[float]] = {}
        self._curves: dict[tuple[int, int], Curve] = {}
        self._views: dict[Hashable, Results] = {}
        self._folds: dict[Hashable, tuple[Any, int]] = {}

    def rung(self, rung: int) -> Mapping[int, float]:
        """Candidate -> score at this rung."""
        return self._rungs[rung] if rung < len(self._rungs) else {}

    def best(self, rung: int, n: int | None = None) -> list[int]:
        """The n best candidates of a rung, or all, best first, of equals the earlier one; without
        those that failed there. Kept in order, so that it costs no sorting."""
        order = self._orders[rung] if rung < len(self._orders) else []
        return [candidate for _, candidate in order[:n]]

    def resting(self, rung: int, n: int | None = None) -> Iterator[int]:
        """Those of the n best of a rung, or of all, that have no score on the next one, best
        first."""
        if rung >= len(self._orders):
            return
        order = self._orders[rung]
        for place in islice(self._resting[rung], n):
            if n is not None and bisect_left(order, place) >= n:
                return
            yield place[1]

    def fold(self, key: Hashable, begin: Callable[[], S], step: Callable[[S, Told], object]) -> S:
        """A state that follows from everything told, in the order told; kept up as more is.

        Args:
            key: of the fold.
            begin: makes the first state.
            step: takes one result in.
        """
        state, n = self._folds.get(key) or (begin(), 0)
        for told in self.told[n:]:
            step(state, told)
        self._folds[key] = state, len(self.told)
        return state

    def scores(self, candidate: int) -> Sequence[float]:
        """The scores of a candidate, one for each rung that it has reached."""
        return self._scores.get(candidate, ())

    def curve(self, candidate: int, rung: int) -> Curve:
        """What is known of a training's course until this rung; () if nothing is."""
        return self._curves.get((candidate, rung), ())

    def view(
        self, name: Hashable, score_of: Callable[[Results, int, int, float], float]
    ) -> Results:
        """The same results with other scores, made of (these, candidate, rung, score) as they come.

        Args:
            name: equal names have equal functions.
            score_of: the score to show.
        """
        view = self._views.setdefault(name, Results())
        view.n_candidates = self.n_candidates
        for candidate, rung, score in self.told[len(view.told) :]:
            view.add(candidate, score_of(self, candidate, rung, score))
        return view

    def add(self, candidate: int, score: float, curve: Curve = ()) -> None:
        """Note the score of a candidate at its next rung."""
        scores = self._scores.setdefault(candidate, [])
        rung = len(scores)
        if curve:
            self._curves[candidate, rung] = curve
        if rung == len(self._rungs):
            self._rungs.append({})
            self._orders.append([])
            self._resting.append([])
        if rung:
            resting, place = self._resting[rung - 1], (-scores[-1], candidate)
            at = bisect_left(resting, place)
            if resting[at : at + 1] == [place]:
                del resting[at]
        scores.append(score)
        self._rungs[rung][candidate] = score
        if score != FAILED:
            place = -score, candidate
            insort(self._orders[rung], place)
            insort(self._resting[rung], place)
        self.n_begun = max(self.n_begun, candidate + 1)
        self.told.append((candidate, rung, score))


class Scheduler(Protocol):
    """Settings of a strategy. It holds no state, so equal results give equal decisions."""

    def check(self) -> None:
        """Raise a SpecError that names the setting out of range."""
        ...

    def budgets(self, candidate: int) -> Sequence[int]:
        """Return the rising budgets at which a candidate is scored; () if it is not wanted."""
        ...

    def survivors(self, results: Results) -> Sequence[int]:
        """Return who should train on to the next budget, most urgent first.

        A candidate that failed is never among them.
        """
        ...


@cache
def geometric_budgets(min_budget: int, max_budget: int, eta: int) -> tuple[int, ...]:
    """Return min_budget * eta^k for k = 0, 1, ... as far as max_budget.

    Raises:
        SpecError: min_budget < 1, eta < 2 or max_budget < min_budget.
    """
    require_at_least(1, min_budget=min_budget)
    require_at_least(2, eta=eta)
    require_at_least(min_budget, max_budget=max_budget)
    budgets = [min_budget]
    while budgets[-1] * eta <= max_budget:
        budgets.append(budgets[-1] * eta)
    return tuple(budgets)


def ranked(scores: Mapping[int, float]) -> list[int]:
    """Order candidates best first, of equals the earlier one; leave failed ones out."""
    succeeded = (candidate for candidate, score in scores.items() if score != FAILED)
    return sorted(succeeded, key=lambda candidate: (-scores[candidate], candidate))


class Schedule(Generic[C]):
    """A study in progress: ask for jobs, run them anywhere, tell their scores in any order.

    What is asked for depends on the results in the order told and on what is running, not on
    when it was asked. Survivors go first, then new candidates.

    A searcher learns a candidate's score where it was trained furthest. A stream is told every
    score at once; one of batches when the scheduler lets a candidate rest for the first time, and
    of later scores while its batch is not complete. So with a stream, what is asked for depends on
    when it was asked, too, and a study repeats itself only where asking and telling alternate
    alike.

    Args:
        scheduler: who trains on.
        search: who takes part, in batches or as a stream; the schedule asks it and tells it.

    Attributes:
        candidates: what the searcher proposed so far; a job names one by its index.
        results: everything told.
        running: jobs asked for and not yet told, by candidate.
        steps: what the jobs told so far had to train in all, each from its checkpoint.

    Raises:
        SpecError: a setting of the scheduler is out of range.
    """

    def __init__(self, scheduler: Scheduler, search: AskTell[C] | Flowing[C]) -> None:
        scheduler.check()
        self.scheduler, self.search = scheduler, search
        self.candidates: list[C] = []
        self.results = Results()
        self.running: dict[int, Instalment] = {}
        self.steps = 0
        self._first_untrained = 0

    def ask(self, n: int = 1) -> list[Instalment]:
        """Return up to n jobs that can run side by side, also beside those that run already.

        Fewer or none means: wait for a result; none while nothing runs means: the study is over.
        """
        jobs: list[Instalment] = []
        while len(jobs) < n and (job := self._next_job()):
            self.running[job.candidate] = job
            jobs.append(job)
        return jobs

    def tell(self, job: Instalment, score: float | None, curve: Curve = ()) -> None:
        """Note a result. None, NaN and infinities all mean that the training failed.

        Args:
            job: from `ask`.
            score: higher is better.
            curve: (budget, training loss) pairs, for a scheduler that looks at them.

        Raises:
            StudyError: the job is not running.
        """
        if self.running.get(job.candidate) != job:
            raise StudyError(f"tell: {job} is not running; tell each job of ask() exactly once")
        self._note(job, score, curve)

    def replay(self, history: Iterable[tuple[Instalment, float | None]]) -> None:
        """Continue a recorded study: take its results as told. Jobs cut short are asked anew.

        Raises:
            StudyError: the record is of another scheduler or searcher.
        """
        for job, score in history:
            while len(self.candidates) <= job.candidate and self._propose():
                pass
            expected = self._job(job.candidate)
            if job != expected or len(self.candidates) <= job.candidate:
                raise StudyError(
                    f"history: result {len(self.results.told)} is of {job}, but this study has "
                    f"{expected or 'no more training'} for that candidate; "
                    "resume with the scheduler, searcher and space that made the history"
                )
            self._note(job, score)

    def best(self) -> tuple[Instalment, float] | None:
        """Return the job with the best score at any budget, and the score.

        Of equals, the one told first; nobody who failed, then or later. None if all failed.

        Source: Li et al. 2018, "Hyperband", algorithm 1, what it returns.
        """
        sound = [told for told in self.results.told if FAILED not in self.results.scores(told[0])]
        if not sound:
            return None
        candidate, rung, score = max(sound, key=lambda told: told[2])
        return Instalment(candidate, self.scheduler.budgets(candidate)[rung]), score

    def _next_job(self) -> Instalment | None:
        for candidate in self._survivors():
            return self._job(candidate)
        new = next(self._untrained())
        if not self.scheduler.budgets(new):
            return None
        if new < len(self.candidates) or self._propose():
            return self._job(new)
        # That there are no more candidates may be what survivors were waiting for.
        return next((self._job(candidate) for candidate in self._survivors()), None)

    def _survivors(self) -> Iterator[int]:
        everyone = self.scheduler.survivors(self.results)
        return (candidate for candidate in everyone if candidate not in self.running)

    def _untrained(self) -> Iterator[int]:
        """Numbers of candidates never trained, proposed already or not: after a crash, the
        first ones may be among them."""
        while self.results.scores(self._first_untrained):
            self._first_untrained += 1
        number = self._first_untrained
        while True:
            if not self.results.scores(number) and number not in self.running:
                yield number
            number += 1

    def _job(self, candidate: int) -> Instalment | None:
        """The next job of a candidate, if it has any budgets left and has not failed."""
        scores, budgets = self.results.scores(candidate), self.scheduler.budgets(candidate)
        if len(scores) == len(budgets) or FAILED in scores:
            return None
        return Instalment(candidate, budgets[len(scores)])

    def _propose(self) -> bool:
        """Take one more candidate from the searcher, if it has one now."""
        candidate = self.search.propose()
        if candidate is not None:
            self.candidates.append(candidate)
            return True
        if self.search.over:
            self.results.n_candidates = len(self.candidates)
        return False

    def _note(self, job: Instalment, score: float | None, curve: Curve = ()) -> None:
        self.running.pop(job.candidate, None)
        rung = len(self.results.scores(job.candidate))
        before = self.scheduler.budgets(job.candidate)[rung - 1] if rung else 0
        self.steps += job.budget - before
        if score is None or not math.isfinite(score):
            score = FAILED
        self.results.add(job.candidate, score, curve)
        if isinstance(self.search, Flowing):
            self.search.tell(job.candidate, score)
        else:
            self.search.amend(job.candidate, score)
            self._tell_batch(self.search)

    def _tell_batch(self, search: AskTell[C]) -> None:
        """Scores go to the searcher in its order, each when its candidate comes to rest."""
        going_on: set[int] | None = None
        while (candidate := len(search.history)) < len(self.candidates):
            if not (scores := self.results.scores(candidate)):
                return
            if going_on is None:
                going_on = set(self.scheduler.survivors(self.results))
            if candidate in going_on:
                return
            search.tell([scores[-1]])


def run(schedule: Schedule[C], evaluate: Callable[[C, int], float | None]) -> Schedule[C]:
    """Run a study to its end, one job after the other, and return it.

    Args:
        schedule: fresh, or after `replay`.
        evaluate: trains a candidate up to a budget, on from where it left it, and scores it.
    """
    while jobs := schedule.ask():
        for job in jobs:
            schedule.tell(job, evaluate(schedule.candidates[job.candidate], job.budget))
    return schedule
