"""Trials by workers that find them in the run's folder: for SLURM arrays and machines that share a
file system and nothing else.

    queue/owner.json   the search: its session, and what each trial may take; "over" at its end
    queue/todo         trials that nobody has begun, the first one first
    queue/taken        trials with the name of their worker, which touches the file as it works
    queue/done         results, until the search has taken them

Every step is a rename on one file system, so a trial has one worker at a time. The journal has one
writer, the search. A worker that dies stops touching its file; its trial goes back to todo after a
lease, and another worker goes on from the checkpoint, with the same result to the last digit. No
clocks are compared: each side watches whether a time of change stands still, by a clock of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from kizzasi.errors import KizzasiError, SpecError, StudyError
from kizzasi.files import write_text
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement
from kizzasi.nas.executors.execute import NO_LIMITS, Counter, Limits, failed
from kizzasi.nas.executors.worker import Worker

QUEUE, OWNER = "queue", "owner.json"
TODO, TAKEN, DONE = "todo", "taken", "done"
POLL_SECONDS = 0.25
BEAT_SECONDS = 5.0  # between two touches
LEASE_SECONDS = 60.0  # without one, a worker is taken for dead
MAX_LOSSES = 3  # of its worker, before a trial is taken for the cause


class Files:
    """The search's side: hands trials out by the folder and takes results from it.

    Args:
        evaluator: what the workers run; they make their own copy of it.
        folder: of the run.
        places: how many workers there will be; fewer or more only change how long it takes.
        n_threads: torch threads of each.
        limits: of each trial.
        device: "cpu", or what each worker has, "cuda".
        lease_seconds: without a sign of life, before a trial is given to another worker.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        folder: Path,
        places: int,
        n_threads: int = 1,
        limits: Limits = NO_LIMITS,
        device: str = "cpu",
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.evaluator, self.folder, self.places, self.device = evaluator, folder, places, device
        self.n_threads, self.limits, self.lease_seconds = n_threads, limits, lease_seconds
        self.queue, self.session = folder / QUEUE, secrets.token_hex(8)
        self.jobs: dict[str, Job] = {}  # by the name of their file
        self.losses: dict[str, int] = {}
        self.leases = _Leases()
        self.n, self.beaten = 0, 0.0

    def submit(self, job: Job) -> None:
        if not self.n:  # not before: the folder is another's until the journal is open
            self._open()
        name = f"{self.n:07d}.json"
        self.n += 1
        self.jobs[name], self.losses[name] = job, 0
        write_text(self.queue / TODO / name, json.dumps(job_data(job, self.folder)))

    def collect(self, bar: Counter) -> tuple[Job, Measurement]:
        """The next result; the bar moves when a trial ends."""
        while True:
            self._beat()
            for path in _files(self.queue / DONE):
                if found := self._received(path, bar):
                    return found
            for path in self.leases.lapsed(_files(self.queue / TAKEN), self.lease_seconds):
                if lost := self._lost(path):
                    return lost
            time.sleep(POLL_SECONDS)

    def _open(self) -> None:
        for name in (TODO, TAKEN, DONE):
            (self.queue / name).mkdir(parents=True, exist_ok=True)
            for path in (self.queue / name).iterdir():  # of a session that was killed
                path.unlink(missing_ok=True)
        self._tell("open")

    def _tell(self, state: str) -> None:
        facts = {"session": self.session, "state": state, "threads": self.n_threads}
        write_text(self.queue / OWNER, json.dumps({**facts, "limits": asdict(self.limits)}))

    def _beat(self) -> None:
        if time.monotonic() - self.beaten > BEAT_SECONDS:
            os.utime(self.queue / OWNER)
            self.beaten = time.monotonic()

    def _received(self, path: Path, bar: Counter) -> tuple[Job, Measurement] | None:
        answer = read_json(path)
        path.unlink(missing_ok=True)
        job = self.jobs.pop(path.name, None) if answer["session"] == self.session else None
        if job is None:
            return None  # of another session, or the second worker of a trial
        for place in (self.queue / TODO / path.name, *self._taken(path.name)):
            place.unlink(missing_ok=True)
        if "error" in answer:
            raise StudyError(f"{answer['worker']}: {answer['error']}")
        bar.update(answer["tokens"])
        return job, measurement_of(answer["measurement"])

    def _taken(self, name: str) -> list[Path]:
        return list((self.queue / TAKEN).glob(f"{name}~*"))

    def _lost(self, path: Path) -> tuple[Job, Measurement] | None:
        """Give a dead worker's trial back, or up."""
        name = path.name.partition("~")[0]
        if name not in self.jobs:
            path.unlink(missing_ok=True)
            return None
        self.losses[name] += 1
        if self.losses[name] > MAX_LOSSES:
            path.unlink(missing_ok=True)
            job, n = self.jobs.pop(name), self.losses[name]
            return job, failed(f"its worker died or went silent {n} times: {path.name}")
        with suppress(FileNotFoundError):  # it has ended, after all
            os.rename(path, self.queue / TODO / name)
        return None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        if self.n:
            for path in _files(self.queue / TODO):
                path.unlink(missing_ok=True)
            self._tell("over")


@dataclass
class _Leases:
    """Watches whether files are still touched."""

    seen: dict[Path, tuple[int, float]] = field(default_factory=dict)

    def lapsed(self, paths: list[Path], seconds: float) -> list[Path]:
        """Those whose time of change has stood still for so long."""
        now, found, seen = time.monotonic(), [], {}
        for path in paths:
            with suppress(FileNotFoundError):
                changed = path.stat().st_mtime_ns
                before, since = self.seen.get(path, (changed, now))
                seen[path] = changed, since if changed == before else now
                if now - seen[path][1] > seconds:
                    found.append(path)
        self.seen = seen
        return found


def serve(
    folder: Path,
    evaluator: Evaluator,
    device: str = "cpu",
    *,
    patience: float = 600.0,
    beat_seconds: float = BEAT_SECONDS,
) -> int:
    """The worker's side: run trials of a run's folder until its search is over.

    Args:
        folder: of the run, as this machine sees it.
        evaluator: what runs a trial, the same as the search's.
        device: of the trials here.
        patience: seconds without a search, or without a sign of life of it, before giving up.
        beat_seconds: between two signs of life.

    Returns:
        How many trials ended here.
    """
    here = _Here(folder / QUEUE, folder, device, beat_seconds)
    leases, quiet, n = _Leases(), time.monotonic(), 0
    worker: Worker | None = None
    made: Mapping[str, Any] = {}
    try:
        while time.monotonic() - quiet < patience:
            owner = here.owner()
            if owner is None or leases.lapsed([here.queue / OWNER], max(60.0, 3 * BEAT_SECONDS)):
                time.sleep(POLL_SECONDS)
                continue
            if owner["state"] == "over":
                return n
            quiet = time.monotonic()
            taken = here.claim()
            if taken is None:
                time.sleep(POLL_SECONDS)
                continue
            if worker is None or made != owner:
                worker = worker and worker.close()
                worker, made = _worker(evaluator, owner, device), owner
            n += here.run(worker, taken, owner["session"])
        return n
    finally:
        if worker is not None:
            worker.close()


def _worker(evaluator: Evaluator, owner: Mapping[str, Any], device: str) -> Worker:
    return Worker(evaluator, owner["threads"], Limits(**owner["limits"]), device)


@dataclass(frozen=True)
class _Here:
    """A worker's place at a queue."""

    queue: Path
    folder: Path
    device: str
    beat_seconds: float
    name: str = field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    )

    def owner(self) -> dict[str, Any] | None:
        with suppress(FileNotFoundError):
            return read_json(self.queue / OWNER)
        return None

    def claim(self) -> Path | None:
        """Take the first trial that nobody else takes."""
        for path in _files(self.queue / TODO):
            taken = self.queue / TAKEN / f"{path.name}~{self.name}"
            with suppress(FileNotFoundError):  # somebody was faster
                os.rename(path, taken)
                os.utime(taken)
                return taken
        return None

    def run(self, worker: Worker, taken: Path, session: str) -> bool:
        """Run a trial and write its result; False if it was taken away meanwhile."""
        try:
            job = job_of(read_json(taken), self.folder)
            answer = self._answer(worker, replace(job, device=self.device), taken)
        except FileNotFoundError:  # the search thinks that this worker is dead
            worker.close()
            return False
        name = taken.name.partition("~")[0]
        said = json.dumps({**answer, "session": session, "worker": self.name})
        write_text(self.queue / DONE / name, said)
        taken.unlink(missing_ok=True)
        return True

    def _answer(self, worker: Worker, job: Job, taken: Path) -> dict[str, Any]:
        for last in (False, True):  # once more if it was killed from outside, as in local.py
            try:
                worker.submit(job)
                tokens, measured = 0, None
                beaten = time.monotonic()
                while measured is None:
                    wait([worker.connection], POLL_SECONDS)
                    trained, measured = worker.poll()
                    tokens += trained
                    if time.monotonic() - beaten > self.beat_seconds:
                        os.utime(taken)
                        beaten = time.monotonic()
            except KizzasiError as error:
                return {"error": str(error)}
            if last or not worker.killed:
                return {"tokens": tokens, "measurement": asdict(measured)}
        raise AssertionError("the second time is the last")


def _files(folder: Path) -> list[Path]:
    """The whole files of a folder, in order; none where there is no folder."""
    with suppress(FileNotFoundError):
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return []


def read_json(path: Path) -> dict[str, Any]:
    """A file of the queue. Raises StudyError if it is damaged, FileNotFoundError if it is gone."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise StudyError(f"{path}: damaged ({error}); delete it") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path}: not of a queue; delete it")
    return found


def job_data(job: Job, folder: Path) -> dict[str, Any]:
    """A job as JSON data, its checkpoint as seen from the run's folder."""
    path = job.checkpoint
    return {
        "spec": job.spec.to_dict(),
        "budget": job.budget,
        "seed": job.seed,
        "settings": dict(job.settings),
        "horizon": job.horizon,
        "checkpoint": None if path is None else str(path.relative_to(folder)),
        "split": job.split,
        "key": job.key,
        "kind": job.kind,
        "parent": None if job.parent is None else job_data(job.parent, folder),
    }


def job_of(data: Mapping[str, Any], folder: Path) -> Job:
    """The job of `job_data`. Raises StudyError where it is none, or leaves the folder."""
    try:
        path, parent = data["checkpoint"], data["parent"]
        place = None if path is None else folder / Path(path)
        if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
            raise StudyError(f"queue: the checkpoint {path!r:.80} is outside the run's folder")
        return Job(
            **{
                **data,
                "spec": ModelSpec.from_dict(data["spec"]),
                "checkpoint": place,
                "parent": None if parent is None else job_of(parent, folder),
            }
        )
    except (KeyError, TypeError, SpecError) as error:
        raise StudyError(f"queue: no trial of this version: {error}") from error


def measurement_of(data: Mapping[str, Any]) -> Measurement:
    """What `asdict` and JSON made of a measurement."""
    values = data["values"]
    return Measurement(
        **{
            **data,
            "curve": tuple((at, loss) for at, loss in data["curve"]),
            "values": None if values is None else tuple(values),
        }
    )
