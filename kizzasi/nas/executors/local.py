"""Trials on this machine: in this process, or in a pool of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait

import torch

from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement
from kizzasi.nas.executors.execute import NO_LIMITS, Counter, Limits, run_job, run_jobs
from kizzasi.nas.executors.worker import Worker

POLL_SECONDS = 0.25


class InProcess:
    """One job after the other, here: for CUDA, debugging and small machines."""

    places = 1

    def __init__(self, evaluator: Evaluator, device: str = "cpu") -> None:
        self.evaluator, self.device = evaluator, device
        self.waiting: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    def collect(self, bar: Counter) -> tuple[Job, Measurement]:
        job = self.waiting.popleft()
        return job, run_job(self.evaluator, replace(job, device=self.device), bar.update)

    def run(self, jobs: Sequence[Job], bar: Counter) -> Iterator[tuple[Job, Measurement]]:
        return run_jobs(self, jobs, bar)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Processes:
    """A pool of worker processes; results do not depend on their number.

    On device "cuda", the workers take the GPUs in turn.

    Args:
        evaluator: copied to every worker.
        n_workers: how many processes.
        n_threads: torch threads of each.
        limits: of each trial.
        device: "cpu", "cuda" or "cuda:1".
    """

    def __init__(
        self,
        evaluator: Evaluator,
        n_workers: int,
        n_threads: int = 1,
        limits: Limits = NO_LIMITS,
        device: str = "cpu",
    ) -> None:
        self.evaluator, self.device, self.places = evaluator, device, n_workers
        devices = [device]
        if device == "cuda":
            devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        self.workers = [
            Worker(evaluator, n_threads, limits, devices[i % len(devices)])
            for i in range(n_workers)
        ]
        self.idle = deque(self.workers)
        self.waiting: deque[Job] = deque()
        self.busy: dict[Worker, Job] = {}
        self.done: deque[tuple[Job, Measurement]] = deque()
        self.alone: set[str] = set()  # keys of trials that were killed from outside

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        self._begin()

    def collect(self, bar: Counter) -> tuple[Job, Measurement]:
        while not self.done:
            self._begin()
            wait([worker.connection for worker in self.busy], POLL_SECONDS)
            for worker in list(self.busy):
                tokens, measured = worker.poll()
                bar.update(tokens)
                if measured is None:
                    continue
                self.idle.appendleft(worker)  # it has torch loaded; the others may not
                job = self.busy.pop(worker)
                if worker.killed and job.key not in self.alone:
                    self.alone.add(job.key)
                    self.waiting.append(job)
                    bar.update(-worker.tokens)
                else:
                    self.done.append((job, measured))
        return self.done.popleft()

    def run(self, jobs: Sequence[Job], bar: Counter) -> Iterator[tuple[Job, Measurement]]:
        """Yield results as they come; the bar follows every step of every worker."""
        return run_jobs(self, jobs, bar)

    def _begin(self) -> None:
        """Hand out what waits, in order. A trial whose process was killed from outside, as the
        kernel does when memory is short, waits again, and then runs with nothing beside it."""
        while self.waiting and self.idle:
            beside = [job.key for job in self.busy.values()]
            lonely = self.waiting[0].key in self.alone
            if beside and (lonely or not self.alone.isdisjoint(beside)):
                return
            worker, job = self.idle.popleft(), self.waiting.popleft()
            worker.submit(job)
            self.busy[worker] = job

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()
