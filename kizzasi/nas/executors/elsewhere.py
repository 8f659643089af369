"""Trials that somebody else runs: what is submitted waits until its measurement is handed in."""

from __future__ import annotations

from collections.abc import Mapping

from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement
from kizzasi.nas.executors.execute import Counter


class WaitingError(Exception):
    """Nothing goes on before somebody hands in a measurement."""


class Elsewhere:
    """An executor that runs nothing itself.

    Args:
        evaluator: never called.
        places: jobs that are handed out at once.
        told: measurements by the id of their trial, in the order in which they came.

    Attributes:
        jobs: handed out and not measured yet, by id.
    """

    device = "elsewhere"

    def __init__(
        self, evaluator: Evaluator, places: int, told: Mapping[str, Measurement] | None = None
    ) -> None:
        self.evaluator, self.places = evaluator, places
        self.told = dict(told or {})
        self.jobs: dict[str, Job] = {}

    def submit(self, job: Job) -> None:
        self.jobs[job.key] = job

    def collect(self, bar: Counter) -> tuple[Job, Measurement]:
        """The next measurement that is there. Raises WaitingError if there is none."""
        for key in self.told:
            if key in self.jobs:
                return self.jobs.pop(key), self.told.pop(key)
        raise WaitingError

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *error: object) -> None:
        pass
