"""One trial as an executor sees it: what it may take, and how it fails."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kizzasi.errors import CheckpointError, DataError, SpecError, StudyError
from kizzasi.files import no_room
from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement, Report

# Faults of a trial. Every other error is the user's or ours, and ends the study.
EXPLOSIONS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
USERS_ERRORS = (StudyError, CheckpointError, DataError)
INNERMOST_FRAMES = -8


@dataclass(frozen=True)
class Limits:
    """What one trial may take before it is stopped and recorded as failed. None: no limit.

    Args:
        seconds: wall-clock time, from the moment a worker takes the trial.
        memory_bytes: on the CPU, private memory beyond what the worker held before the trial
            (Linux only); on CUDA, memory of the worker's device.
    """

    seconds: float | None = None
    memory_bytes: int | None = None

    def check(self, device: str) -> None:
        """Raises SpecError naming the limit and the rule."""
        if self.seconds is not None and not self.seconds > 0:
            raise SpecError(f"trial seconds: {self.seconds} must be above 0")
        if self.memory_bytes is None:
            return
        if not self.memory_bytes > 0:
            raise SpecError(f"trial memory: {self.memory_bytes} bytes must be above 0")
        if device == "cpu" and sys.platform != "linux":
            raise SpecError("trial memory: a limit on the CPU needs Linux; leave it out")


NO_LIMITS = Limits()


class Counter(Protocol):
    """What is told of tokens as they are trained on: a bar of tqdm, or a `Line`."""

    def update(self, n: int, /) -> object: ...


class Executor(Protocol):
    """Runs jobs that do not depend on each other, each as soon as there is a place for it.

    A context manager: leaving it stops what is still running.

    Attributes:
        places: how many jobs run side by side; more may be submitted, and wait.
        device: of its jobs: "cpu", "cuda", ...
    """

    places: int
    device: str

    @property
    def evaluator(self) -> Evaluator: ...

    def submit(self, job: Job) -> None:
        """Hand over a job; it begins when there is a place, the first one submitted first."""
        ...

    def collect(self, bar: Counter) -> tuple[Job, Measurement]:
        """Wait for the next result of any job submitted; the bar follows the progress of all."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...


def run_jobs(
    executor: Executor, jobs: Sequence[Job], bar: Counter
) -> Iterator[tuple[Job, Measurement]]:
    """Run jobs, and nothing else beside them; yield each result as it is there."""
    for job in jobs:
        executor.submit(job)
    for _ in jobs:
        yield executor.collect(bar)


def evaluate(evaluator: Evaluator, job: Job, report: Report) -> Measurement:
    """Run one job. Raises what the trial raises, but a full disk is no fault of the trial."""
    where = job.checkpoint.parent if job.checkpoint else "checkpoint"
    try:
        found = evaluator(job, report)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StudyError(f"{where}: {reason}; make room, then --resume") from error
    except RuntimeError as error:  # what torch.save makes of a full disk
        if not no_room(error):
            raise
        raise StudyError(f"{where}: no space left on the disk; make room, then --resume") from error
    if not isinstance(found, Measurement):
        return Measurement(float(found), spent=job.budget)
    if found.score is not None and not found.spent:
        return replace(found, spent=job.budget)
    return found


def run_job(evaluator: Evaluator, job: Job, report: Report) -> Measurement:
    """Run one job. A trial that raises is a failed measurement that carries its traceback."""
    try:
        return evaluate(evaluator, job, report)
    except USERS_ERRORS:
        raise
    except EXPLOSIONS:
        return failed(traceback.format_exc(INNERMOST_FRAMES))


def failed(reason: str) -> Measurement:
    return Measurement(None, failure=reason)
