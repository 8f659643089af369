"""Simulated trainings: learning curves whose truth is known, and workers with a simulated clock.

For tests and benchmarks of schedulers; nothing here is trained.

    loss(t) = start - drop * t^2 / (t^2 + half^2)

t = steps trained;  start = loss at t = 0;  drop = start - loss at t = inf;
half = steps to half of the drop
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers import Instalment, Schedule
from kizzasi.nas.schedulers.schedule import Curve as Course
from kizzasi.nas.searchers.ask_tell import require_at_least
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.train.seeds import derive_seed

C = TypeVar("C")

UNIFORM = 8.0  # bits per byte of a model that knows nothing
POINTS = 16  # of a training's course


@dataclass(frozen=True)
class Curve:
    """One learning curve.

    Args:
        drop: what endless training takes off the loss, in bits per byte.
        half: steps to half of the drop; large for a late bloomer.
        noise: standard deviation of a score.
        seed: of the noise; a score depends on it and on the number of steps alone.
        crashes_at, diverges_at: the step that fails, from 1; None if there is none.
        start: loss before the first step.
    """

    drop: float
    half: float
    noise: float = 0.0
    seed: int = 0
    crashes_at: int | None = None
    diverges_at: int | None = None
    start: float = UNIFORM

    def loss(self, steps: float) -> float:
        """Return the true loss after so many steps, without noise or failures."""
        return self.start - self.drop * steps**2 / (steps**2 + self.half**2)

    def crossing(self, other: Curve) -> float | None:
        """Return after how many steps two curves from one start cross; None if they do not.

        t^2 = (drop_1 half_2^2 - drop_2 half_1^2) / (drop_2 - drop_1)
        """
        assert self.start == other.start
        gain = other.drop - self.drop
        lag = self.drop * other.half**2 - other.drop * self.half**2
        return math.sqrt(lag / gain) if gain and lag / gain > 0 else None


class SimulatedTraining:
    """A curve with the face of a `Training`: run it to a budget, score it, go on.

    Args:
        curve: its truth.
    """

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self.step = 0

    def run(self, steps: int) -> str | None:
        """Train until the budget is reached.

        Args:
            steps: the budget, counted from the very first step.

        Returns:
            None, or why the training had to stop: a divergence.

        Raises:
            RuntimeError: a crash.
        """
        assert steps > self.step, f"trained to {self.step} steps already, so not to {steps} again"
        crash, divergence = self.curve.crashes_at or math.inf, self.curve.diverges_at or math.inf
        self.step = int(min(steps, crash, divergence))
        if self.step == crash:
            raise RuntimeError(f"simulated crash at step {self.step}")
        if self.step == divergence:
            return f"simulated divergence at step {self.step}"
        return None

    def score(self) -> float:
        """Return the loss after the steps trained, with its noise."""
        rng = Xorshift64(derive_seed(self.curve.seed, "noise", self.step))
        return self.curve.loss(self.step) + self.curve.noise * _normal(rng)

    def points(self) -> list[tuple[float, float | None]]:
        """(steps, training loss) pairs, evenly spaced, with noise like that of a score."""
        rng = Xorshift64(derive_seed(self.curve.seed, "points", self.step))
        n = min(POINTS, self.step)
        steps = [self.step * (i + 1) / n for i in range(n)]
        return [(t, self.curve.loss(t) + self.curve.noise * _normal(rng)) for t in steps]


def _normal(rng: Xorshift64) -> float:
    return NormalDist().inv_cdf(max(rng.next_f64(), 2.0**-53))


class SimulatedTrainings:
    """An evaluator with a checkpoint for each candidate; minus the loss is the score.

    Args:
        curve: of a candidate.

    Attributes:
        trainings: by candidate.
        scored: (candidate, budget) of every call, in order.
    """

    def __init__(self, curve: Callable[[int], Curve]) -> None:
        self.curve = curve
        self.trainings: dict[int, SimulatedTraining] = {}
        self.scored: list[tuple[int, int]] = []

    @property
    def steps(self) -> int:
        """Steps really trained; a failed training stops before its budget."""
        return sum(training.step for training in self.trainings.values())

    def __call__(self, candidate: int, budget: int) -> float | None:
        """Train a candidate up to a budget, on from where it is; None if that failed."""
        self.scored.append((candidate, budget))
        if candidate not in self.trainings:
            self.trainings[candidate] = SimulatedTraining(self.curve(candidate))
        training = self.trainings[candidate]
        try:
            failure = training.run(budget)
        except RuntimeError:
            return None
        return None if failure else -training.score()

    def points(self, candidate: int) -> list[tuple[float, float | None]]:
        """The course of a candidate's training so far."""
        return self.trainings[candidate].points()


@dataclass(frozen=True)
class SimulatedCurves:
    """A space of `size` candidates, each a number with a curve of its own, drawn from the seed.

    Steady curves fall early or later, to a bad or a good loss; late bloomers fall after the
    earlier half of them, and end better than all.

    Args:
        size: how many candidates.
        seed: of the curves; a family of one size is the beginning of a larger one.
        horizon: steps of a full training; curves are stretched to fit it.
        late, crashing, diverging: share of late bloomers, and of those that fail on the way.
        noise: standard deviation of a score.
    """

    size: int
    seed: int
    horizon: int
    late: float = 0.1
    crashing: float = 0.0
    diverging: float = 0.0
    noise: float = 0.0

    def check(self) -> None:
        """Raises SpecError naming the value and the rule."""
        require_at_least(1, size=self.size, horizon=self.horizon)
        shares = (self.late, self.crashing, self.diverging)
        if min(*shares, self.noise) < 0 or max(self.late, self.crashing + self.diverging) > 1:
            raise SpecError(
                f"late, crashing, diverging: {shares} and noise: {self.noise}; give shares in "
                "0 .. 1, failures together at most 1, and noise of at least 0"
            )

    def curve(self, candidate: int) -> Curve:
        """Return the curve of a candidate; equal in every process."""
        rng = Xorshift64(derive_seed(self.seed, "curve", candidate))
        is_late = rng.next_f64() < self.late
        quality, slowness, fate, moment = (rng.next_f64() for _ in range(4))
        if is_late:
            drop, half = 6.5 + 0.3 * quality, self.horizon * 0.02 * 2.5**slowness
        else:
            drop, half = 4.5 + 1.5 * quality, self.horizon * 0.01 * 16**slowness
        fails_at = 1 + int(moment * self.horizon)
        crashes = fate < self.crashing
        diverges = not crashes and fate < self.crashing + self.diverging
        return Curve(
            drop,
            half,
            noise=self.noise,
            seed=derive_seed(self.seed, "score", candidate),
            crashes_at=fails_at if crashes else None,
            diverges_at=fails_at if diverges else None,
        )

    def regret(self, candidate: int | None) -> float:
        """Return how far a candidate's true loss at the horizon is from the best.

        One that fails on the way there, and None, have learnt nothing.
        """
        best = min(self._final_loss(number) for number in range(self.size))
        return (UNIFORM if candidate is None else self._final_loss(candidate)) - best

    def _final_loss(self, candidate: int) -> float:
        curve = self.curve(candidate)
        fails = curve.crashes_at is not None or curve.diverges_at is not None
        return UNIFORM if fails else curve.loss(self.horizon)

    def sample(self, rng: Xorshift64) -> int:
        return rng.choice(range(self.size))

    def build(self, decide: Callable[[str, int], int]) -> int:
        """Candidates have one gene."""
        return decide("number", self.size)

    def mutate(self, candidate: int, rng: Xorshift64, prob: float) -> int:
        return self.sample(rng) if rng.next_f64() < prob else candidate

    def crossover(self, a: int, b: int, rng: Xorshift64) -> int:
        return rng.choice((a, b))

    def iterate(self, limit: int | None = None) -> Sequence[int]:
        return range(self.size)[:limit]

    def contains(self, candidate: int) -> bool:
        return 0 <= candidate < self.size


def run_workers(
    schedule: Schedule[C],
    evaluate: Callable[[C, int], float | None],
    n_workers: int,
    seconds: Callable[[Instalment], float],
    course: Callable[[C], Course] = lambda candidate: (),
) -> float:
    """Run a study to its end with workers that finish at different times.

    Args:
        schedule: fresh, or after `replay`.
        evaluate: trains a candidate up to a budget and scores it.
        n_workers: at least 1; a free one asks at once.
        seconds: what a job takes.
        course: of a candidate's training so far.

    Returns:
        The simulated time at the end, in seconds.
    """
    clock = 0.0
    busy: list[tuple[float, int, Instalment]] = []  # when it ends, and the order of asking for ties
    n_asked = 0
    while True:
        for job in schedule.ask(n_workers - len(busy)):
            heapq.heappush(busy, (clock + seconds(job), n_asked, job))
            n_asked += 1
        if not busy:
            return clock
        clock, _, job = heapq.heappop(busy)
        candidate = schedule.candidates[job.candidate]
        score = evaluate(candidate, job.budget)
        schedule.tell(job, score, course(candidate))
