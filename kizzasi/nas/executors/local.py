"""Trials on this machine: in this process, or in a pool of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait

import torch
from tqdm import tqdm

from kizzasi.nas.evaluators.micro_training import Measurement, MicroTrain
from kizzasi.nas.executors.job import NO_LIMITS, Job, Limits, run_job
from kizzasi.nas.executors.worker import Worker

POLL_SECONDS = 0.25


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
    """A pool of worker processes; results do not depend on their number.

    On device "cuda", the workers take the GPUs in turn.

    Args:
        evaluator: copied to every worker.
        n_workers: how many processes.
        n_threads: torch threads of each.
        limits: of each trial.
    """

    def __init__(
        self,
        evaluator: MicroTrain,
        n_workers: int,
        n_threads: int = 1,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self.evaluator = evaluator
        devices = [evaluator.device]
        if evaluator.device == "cuda":
            devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        self.workers = [
            Worker(replace(evaluator, device=devices[i % len(devices)]), n_threads, limits)
            for i in range(n_workers)
        ]

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Iterator[tuple[Job, Measurement]]:
        """Yield results as they come; the bar follows every step of every worker."""
        waiting, idle = deque(jobs), deque(self.workers)
        busy: dict[Worker, Job] = {}
        while waiting or busy:
            while waiting and idle:
                worker, job = idle.popleft(), waiting.popleft()
                worker.submit(job)
                busy[worker] = job
            wait([worker.connection for worker in busy], POLL_SECONDS)
            for worker in list(busy):
                tokens, measured = worker.poll()
                bar.update(tokens)
                if measured is not None:
                    idle.append(worker)
                    yield busy.pop(worker), measured

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()
