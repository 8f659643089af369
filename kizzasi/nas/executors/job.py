"""One trial as an executor sees it: what to run, what it may take, and how it fails."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from kizzasi.errors import CheckpointError, DataError, SpecError, StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.micro_training import Measurement, MicroTrain

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
class Job:
    """One trial up to one budget.

    Args:
        key: the trial id, unique in a study.
        spec: what to train.
        tokens: the budget, earlier rungs included.
        seed: of the initialisation and of the windows drawn.
        lr: peak learning rate.
        horizon: tokens at which the learning-rate schedule ends.
        checkpoint: where the training is kept between rungs.
    """

    key: str
    spec: ModelSpec
    tokens: int
    seed: int
    lr: float
    horizon: int
    checkpoint: Path | None = None


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


class Executor(Protocol):
    """Runs jobs that do not depend on each other and yields each result as it is there.

    A context manager: leaving it stops what is still running.
    """

    @property
    def evaluator(self) -> MicroTrain: ...

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Iterator[tuple[Job, Measurement]]: ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...


def train(evaluator: MicroTrain, job: Job, on_step: Callable[[int], Any]) -> Measurement:
    """Run one job. Raises what the trial raises, but a full disk is no fault of the trial."""
    recipe = replace(evaluator.recipe, lr=job.lr, horizon=job.horizon)
    evaluator = replace(evaluator, recipe=recipe)
    try:
        return evaluator(job.spec, job.tokens, job.seed, checkpoint=job.checkpoint, on_step=on_step)
    except OSError as error:
        where = job.checkpoint.parent if job.checkpoint else "checkpoint"
        raise StudyError(f"{where}: {error.strerror}; make room, then --resume") from error


def run_job(evaluator: MicroTrain, job: Job, on_step: Callable[[int], Any]) -> Measurement:
    """Run one job. A trial that raises is a failed measurement that carries its traceback."""
    try:
        return train(evaluator, job, on_step)
    except USERS_ERRORS:
        raise
    except EXPLOSIONS:
        return failed(traceback.format_exc(INNERMOST_FRAMES))


def failed(reason: str) -> Measurement:
    return Measurement(None, 0, 0.0, None, (), reason)
