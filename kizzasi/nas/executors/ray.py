"""Trials on a Ray cluster: the same workers, each inside a Ray actor on one of its nodes.

Every node needs kizzasi installed, and must see the run's folder under the same path, because a
trial may continue on another node from its checkpoint there. A node may die at any time: its
trials are run again elsewhere, with the same result to the last digit.
"""

from __future__ import annotations

import importlib
import secrets
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from kizzasi.errors import KizzasiError, StudyError
from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement
from kizzasi.nas.executors.execute import NO_LIMITS, Counter, Limits, failed, run_jobs
from kizzasi.nas.executors.worker import Worker

POLL_SECONDS = 0.25
CONNECT_SECONDS = 10
MAX_LOSSES = 3  # of its actor, before a trial is taken for the cause
PROBE = ".shared"


class Ray:
    """A pool of actors on a Ray cluster; results do not depend on their number or place.

    A program that has called `ray.init` keeps its own connection, whatever the address.

    Args:
        evaluator: copied to every actor.
        address: "local" starts a cluster on this machine, which ends with this process; "auto"
            or "host:port" joins one.
        n_workers: how many actors; None takes as many as the cluster has room for.
        n_threads: torch threads of each, and the CPUs that it reserves; a GPU each on CUDA.
        limits: of each trial.
        device: "cpu", or "cuda" for a GPU each.

    Raises:
        StudyError: Ray is not installed, there is no cluster at the address, or no room in it.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        address: str = "local",
        n_workers: int | None = None,
        n_threads: int = 1,
        limits: Limits = NO_LIMITS,
        device: str = "cpu",
    ) -> None:
        self.evaluator, self.device = evaluator, device
        self.ray = _import_ray()
        self.own = not self.ray.is_initialized()
        if self.own:
            _connect(self.ray, address)
        n_gpus = int(device != "cpu")
        self.places = self.n_workers = n_workers or _room(self.ray, n_threads, n_gpus)
        self.actor = self.ray.remote(num_cpus=n_threads, num_gpus=n_gpus)(_Place)
        self.arguments = (self.ray.put(evaluator), n_threads, limits, device)
        self.actors: list[Any] = []
        self.idle: list[Any] = []
        self.pending: dict[Any, tuple[Any, Job | None]] = {}  # Job None: the actor is starting
        self.failed_starts = 0
        self.probes: dict[Path, str] = {}
        self.waiting: deque[Job] = deque()
        self.losses: dict[str, int] = {}

    def submit(self, job: Job) -> None:
        if (path := job.checkpoint) is not None:
            job = replace(job, checkpoint=path.resolve())
            self._leave_probe(path.resolve().parent)
        self.losses[job.key] = 0
        self.waiting.append(job)
        self._begin()

    def collect(self, bar: Counter) -> tuple[Job, Measurement]:
        """The next result; the bar moves when a trial ends."""
        while True:
            self._begin()
            for ref in self.ray.wait(list(self.pending), timeout=POLL_SECONDS)[0]:
                actor, job = self.pending.pop(ref)
                try:
                    answer = self.ray.get(ref)
                except self.ray.exceptions.RayActorError as error:
                    self.actors.remove(actor)
                    self.ray.kill(actor)  # it may only be out of reach
                    measured = self._lost(job, error)
                    if job is not None and measured is None:
                        self.waiting.appendleft(job)
                else:
                    self.idle.append(actor)
                    measured = self._received(answer, bar)
                if job is not None and measured is not None:
                    del self.losses[job.key]
                    return job, measured

    def run(self, jobs: Sequence[Job], bar: Counter) -> Iterator[tuple[Job, Measurement]]:
        """Yield results as they come."""
        return run_jobs(self, jobs, bar)

    def _begin(self) -> None:
        """Start actors while there is work for them, and hand out what waits."""
        while len(self.actors) < min(self.places, len(self.losses)):
            self._start_actor()
        while self.waiting and self.idle:
            actor, job = self.idle.pop(), self.waiting.popleft()
            self.pending[actor.run.remote(job)] = actor, job

    def _start_actor(self) -> None:
        actor = self.actor.remote(*self.arguments)
        self.actors.append(actor)
        self.pending[actor.ready.remote(self.probes)] = actor, None

    def _received(self, answer: Any, bar: Counter) -> Measurement | None:
        if isinstance(answer, KizzasiError):
            raise answer
        self.failed_starts = 0
        tokens, measured = answer
        bar.update(tokens)
        return measured

    def _lost(self, job: Job | None, error: Exception) -> Measurement | None:
        """An actor died, with its node or alone. None: another one is worth trying."""
        if job is None:
            self.failed_starts += 1
            if self.failed_starts > MAX_LOSSES:
                raise StudyError(f"--executor ray: no worker can start: {error}") from error
            return None
        self.losses[job.key] += 1
        if self.losses[job.key] <= MAX_LOSSES:
            return None
        return failed(f"lost its Ray actor {self.losses[job.key]} times; the last time: {error}")

    def _leave_probe(self, folder: Path) -> None:
        """A random word in every folder of checkpoints, which each actor has to find there."""
        if folder not in self.probes:
            self.probes[folder] = secrets.token_hex(8)
            (folder / PROBE).write_text(self.probes[folder])

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *error: object) -> None:
        for folder in self.probes:
            (folder / PROBE).unlink(missing_ok=True)
        for actor in self.actors:
            self.ray.kill(actor)
        if self.own:
            self.ray.shutdown()


class _Place:
    """The actor: a worker process on its node, so that a trial that explodes is not a lost node."""

    def __init__(
        self, evaluator: Evaluator, n_threads: int, limits: Limits, device: str = "cpu"
    ) -> None:
        self.worker = Worker(evaluator, n_threads, limits, device)

    def ready(self, probes: Mapping[Path, str]) -> tuple[int, None] | StudyError:
        for folder, word in probes.items():
            probe = folder / PROBE
            if not probe.is_file() or probe.read_text() != word:
                node = importlib.import_module("ray").util.get_node_ip_address()
                return StudyError(
                    f"{folder}: the Ray node {node} does not see this folder; put --out on a "
                    "file system that all nodes share, under the same path"
                )
        return 0, None

    def run(self, job: Job) -> tuple[int, Measurement] | KizzasiError:
        try:
            tokens, measured = self._measured(job)
            if self.worker.killed:  # from outside: once more, as in local.py
                tokens, measured = self._measured(job)
            return tokens, measured
        except KizzasiError as error:
            return error

    def _measured(self, job: Job) -> tuple[int, Measurement]:
        self.worker.submit(job)
        tokens, measured = 0, None
        while measured is None:
            wait([self.worker.connection], POLL_SECONDS)
            trained, measured = self.worker.poll()
            tokens += trained
        return tokens, measured


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise StudyError(
            f"--executor ray: {error}; pip install 'kizzasi-models[ray]', or use "
            "--executor processes"
        ) from error


def _connect(ray: Any, address: str) -> None:
    try:
        if address not in ("local", "auto"):  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    except Exception as error:  # Ray raises a bare one where a node does not start in time
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StudyError(
            f"--address {address}: {reason}; start a cluster with `ray start --head`, "
            "or use --address local"
        ) from error


def _room(ray: Any, n_threads: int, n_gpus: int) -> int:
    """How many workers fit into the cluster."""
    found = ray.cluster_resources()
    cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
    room = min(cpus // n_threads, gpus if n_gpus else cpus)
    if room == 0:
        raise StudyError(
            f"--executor ray: the cluster has {cpus} CPUs and {gpus} GPUs; a worker needs "
            f"{n_threads} and {n_gpus}"
        )
    return room
