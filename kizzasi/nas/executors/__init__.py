"""Where trials run: in this process, in a pool of processes, on a Ray cluster, or by a folder.

    in-process   one after the other; no limits, and a trial that aborts takes the search with it
    processes    a pool on this machine; a trial that explodes is recorded, and the search goes on
    ray          the same pool over the nodes of a cluster; a node may die
    files        workers that find trials in the run's folder (`kizzasi worker`), such as a SLURM
                 array; any of them may die

A result depends on its job and the number of torch threads, not on the executor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import torch

from kizzasi.errors import SpecError
from kizzasi.nas.evaluators.evaluator import Evaluator, Job
from kizzasi.nas.executors.execute import NO_LIMITS, Executor, Limits, run_job
from kizzasi.nas.executors.files import Files
from kizzasi.nas.executors.local import InProcess, Processes
from kizzasi.nas.executors.ray import Ray

Kind = Literal["in-process", "processes", "ray", "files"]
KINDS: tuple[Kind, ...] = get_args(Kind)

__all__ = [
    "KINDS",
    "NO_LIMITS",
    "Executor",
    "Files",
    "InProcess",
    "Job",
    "Kind",
    "Limits",
    "Processes",
    "Ray",
    "open_executor",
    "run_job",
]


def open_executor(
    evaluator: Evaluator,
    kind: Kind | None = None,
    workers: int | None = None,
    threads: int | None = None,
    limits: Limits = NO_LIMITS,
    address: str = "local",
    device: str = "cpu",
    folder: Path | None = None,
) -> Executor:
    """The executor of a search.

    Args:
        evaluator: what runs a trial.
        kind: None takes processes for several workers, threads, or limits.
        workers: how many trials side by side. None is one per core or GPU in "processes", and
            what the cluster has room for in "ray".
        threads: torch threads of each worker; results agree to the last digit only where it is
            the same. None shares the cores out in "processes", and is 1 in "ray".
        limits: of each trial.
        address: of the Ray cluster.
        device: "cpu", "cuda" for all GPUs there are, or "cuda:1".
        folder: of the run, for "files".

    Raises:
        SpecError: a limit breaks a rule, or the executor cannot enforce it.
        StudyError: there is no such Ray cluster.
    """
    limits.check(device)
    for name, count in (("workers", workers), ("threads", threads)):
        if count is not None and count < 1:
            raise SpecError(f"{name}: {count} must be at least 1")
    cores = os.cpu_count() or 1
    room = cores if device == "cpu" else torch.cuda.device_count() if device == "cuda" else 1
    own_process = (workers or 1) > 1 or threads is not None or limits != NO_LIMITS
    if kind is None:
        several = workers is None and room > 1
        kind = "processes" if several or own_process else "in-process"
    if address != "local" and kind != "ray":
        raise SpecError(f"address: {address} is of a Ray cluster; use --executor ray")
    if kind == "ray":
        return Ray(evaluator, address, workers, threads or 1, limits, device)
    if kind == "files":
        if folder is None or workers is None:
            raise SpecError(
                "executor: files needs the run's folder and the number of workers that will come; "
                "give --workers"
            )
        return Files(evaluator, folder, workers, threads or 1, limits, device)
    if kind == "processes":
        workers = workers or max(1, room)
        threads = threads or max(1, cores // workers)
        return Processes(evaluator, workers, threads, limits, device)
    if own_process:
        raise SpecError(
            "several workers, threads and trial limits need processes; use --executor processes"
        )
    return InProcess(evaluator, device)
