"""Trials on this machine: in this process, or in a pool of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait

import torch
from tqdm import tqdm

from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement
from kizzasi.nas.executors.execute import NO_LIMITS, Limits, run_job
from kizzasi.nas.executors.worker import Worker

POLL_SECONDS = 0.25


class InProcess:
    """One job after the other, here: for CUDA, debugging and small machines."""

    def __init__(self, evaluator: Evaluator, device: str = "cpu") -> None:
        self.evaluator, self.device = evaluator, device

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Iterator[tuple[Job, Measurement]]:
        for job in jobs:
            on = replace(job, device=self.device)
            yield job, run_job(self.evaluator, on, bar.update)

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
        self.evaluator, self.device = evaluator, device
        devices = [device]
        if device == "cuda":
            devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        self.workers = [
            Worker(evaluator, n_threads, limits, devices[i % len(devices)])
            for i in range(n_workers)
        ]

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Iterator[tuple[Job, Measurement]]:
        """Yield results as they come; the bar follows every step of every worker.

        A trial whose process was killed from outside, as the kernel does when memory is short, is
        tried once more when all others are done, alone.
        """
        waiting, idle = deque(jobs), deque(self.workers)
        busy: dict[Worker, Job] = {}
        alone, again = deque[Job](), set[str]()
        while waiting or busy or alone:
            if alone and not waiting and not busy:
                waiting.append(alone.popleft())
            while waiting and idle:
                worker, job = idle.popleft(), waiting.popleft()
                worker.submit(job)
                busy[worker] = job
            wait([worker.connection for worker in busy], POLL_SECONDS)
            for worker in list(busy):
                tokens, measured = worker.poll()
                bar.update(tokens)
                if measured is None:
                    continue
                idle.append(worker)
                job = busy.pop(worker)
                if worker.killed and job.key not in again:
                    again.add(job.key)
                    alone.append(job)
                    bar.update(-worker.tokens)
                else:
                    yield job, measured

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()
