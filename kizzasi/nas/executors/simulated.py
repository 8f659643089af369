"""Workers on a simulated clock, for tests and benchmarks of everything around the trainings."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement
from kizzasi.nas.executors.execute import Counter, run_job


class Simulated:
    """An executor whose jobs take as long as one says. They are really run, when they end.

    Args:
        evaluator: what runs a job.
        places: how many workers.
        seconds: what a job takes on the clock.

    Attributes:
        clock: seconds since the beginning.
        worked: seconds of all jobs that have ended.
    """

    device = "cpu"

    def __init__(self, evaluator: Evaluator, places: int, seconds: Callable[[Job], float]) -> None:
        self.evaluator, self.places, self.seconds = evaluator, places, seconds
        self.clock = self.worked = 0.0
        self.waiting: deque[Job] = deque()
        self.busy: list[tuple[float, int, Job]] = []  # when it ends; of equals, the first submitted
        self.n = 0

    @property
    def busy_share(self) -> float:
        """Of the workers' time until now, the share in which they had a job."""
        return self.worked / (self.clock * self.places)

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        self._begin()

    def _begin(self) -> None:
        while self.waiting and len(self.busy) < self.places:
            job = self.waiting.popleft()
            heapq.heappush(self.busy, (self.clock + self.seconds(job), self.n, job))
            self.n += 1

    def collect(self, bar: Counter) -> tuple[Job, Measurement]:
        self._begin()
        self.clock, _, job = heapq.heappop(self.busy)
        self.worked += self.seconds(job)
        return job, run_job(self.evaluator, job, bar.update)

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *error: object) -> None:
        pass
