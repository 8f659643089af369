"""Where trials run: in this process, or in a pool of processes with their share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.microtrain import Measurement, MicroTrain

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Job:
    """One trial up to one budget.

    Args:
        key: the trial id, unique in a study.
        spec: what to train.
        tokens: the budget, earlier rungs included.
        seed: of the initialisation.
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


class Executor(Protocol):
    """Runs jobs that do not depend on each other and yields each result as it is there.

    A context manager: leaving it stops what is still running.
    """

    @property
    def evaluator(self) -> MicroTrain: ...

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Iterator[tuple[Job, Measurement]]: ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...


class Interrupted(BaseException):
    """Stops a training between two steps after Ctrl-C."""


def run_job(evaluator: MicroTrain, job: Job, on_step: Any) -> Measurement:
    """Run one job. A trial that raises is a failed measurement that carries its traceback;
    a full disk is no fault of the trial and ends the study."""
    recipe = replace(evaluator.recipe, lr=job.lr, horizon=job.horizon)
    evaluator = replace(evaluator, recipe=recipe)
    try:
        return evaluator(job.spec, job.tokens, job.seed, checkpoint=job.checkpoint, on_step=on_step)
    except OSError as error:
        where = job.checkpoint.parent if job.checkpoint else "checkpoint"
        raise StudyError(f"{where}: {error.strerror}; make room, then --resume") from error
    except (RuntimeError, ArithmeticError, MemoryError):
        return Measurement(None, 0, 0.0, None, (), traceback.format_exc(limit=8))


class InProcess:
    """One job after the other, here: for CUDA, debugging and small machines."""

    def __init__(self, evaluator: MicroTrain) -> None:
        self.evaluator = evaluator

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Iterator[tuple[Job, Measurement]]:
        for job in jobs:
            yield job, run_job(self.evaluator, job, bar.update)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Processes:
    """A pool of worker processes on the CPU; results do not depend on their number.

    Args:
        evaluator: copied to every worker.
        n_workers: how many processes.
        n_threads: torch threads of each.
    """

    def __init__(self, evaluator: MicroTrain, n_workers: int, n_threads: int = 1) -> None:
        self.evaluator = evaluator
        context = multiprocessing.get_context("spawn")
        self.tokens, self.stop = context.Value("q", 0), context.Event()
        self.pool = ProcessPoolExecutor(
            n_workers,
            mp_context=context,
            initializer=_start_worker,
            initargs=(evaluator, n_threads, self.tokens, self.stop),
        )

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Iterator[tuple[Job, Measurement]]:
        """Yield results as they come; the bar follows every step of every worker."""
        shown = self.tokens.value
        try:
            waiting: dict[Future[Measurement], Job] = {
                self.pool.submit(_work, job): job for job in jobs
            }
            while waiting:
                finished, _ = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                trained: int = self.tokens.value
                bar.update(trained - shown)
                shown = trained
                for future in finished:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise StudyError(
                "a worker process died (out of memory?); use fewer --workers and --resume"
            ) from error

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        """After Ctrl-C the workers stop at their next step; nothing finished is lost."""
        self.stop.set()
        self.pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(evaluator: MicroTrain, n_threads: int, tokens: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.set_num_threads(n_threads)
    _worker.update(evaluator=evaluator, tokens=tokens, stop=stop)
    parent = os.getppid()

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(job: Job) -> Measurement:
    def on_step(tokens: int) -> None:
        with _worker["tokens"].get_lock():
            _worker["tokens"].value += tokens
        if _worker["stop"].is_set():
            raise Interrupted

    return run_job(_worker["evaluator"], job, on_step)
