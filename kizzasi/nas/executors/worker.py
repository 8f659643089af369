"""A process that runs trials one after another, and may die of one of them.

A trial that raises, aborts, is killed by the kernel, hangs, or wants all memory becomes a failed
measurement with its traceback or signal, and the next trial gets a fresh process. A worker that
outlives its parent stops itself.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from kizzasi.children import Child
from kizzasi.errors import KizzasiError, StudyError
from kizzasi.nas.evaluators.evaluator import Evaluator, Job, Measurement
from kizzasi.nas.executors.execute import (
    EXPLOSIONS,
    INNERMOST_FRAMES,
    USERS_ERRORS,
    Limits,
    evaluate,
    failed,
)

LAST_WORDS = 4096  # bytes kept of what a dying worker says


class Worker:
    """One place to run trials: a process, renewed when a trial took it down.

    Args:
        evaluator: copied to the process.
        n_threads: torch threads of the process.
        limits: of each trial.
        device: of its trials.
    """

    connection: Connection

    def __init__(
        self, evaluator: Evaluator, n_threads: int, limits: Limits, device: str = "cpu"
    ) -> None:
        self.evaluator, self.n_threads, self.limits = evaluator, n_threads, limits
        self.device = device
        self.process: SpawnProcess | None = None
        self.began: float | None = None  # when the trial did; None while the process still starts
        self.tokens = 0
        self.killed = False  # the last trial ended by SIGKILL, which comes from outside
        self.stillborn = False  # so did the last process, before it began a trial

    def submit(self, job: Job) -> None:
        """Hand a job to the process; `connection` becomes readable when there is news of it."""
        if self.process is None or not self.process.is_alive():
            self._start()
        self.began, self.tokens, self.killed = None, 0, False
        self.connection.send(replace(job, device=self.device))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, connection = context.Pipe()
        self.last_words, last_words = context.Pipe(duplex=False)
        arguments = (connection, last_words, self.evaluator, self.n_threads, self.limits)
        target = Child(f"{__name__}:serve", os.getpid())
        self.process = context.Process(target=target, args=arguments, daemon=True)
        with _deaf_to_ctrl_c():
            self.process.start()
        connection.close()  # now the process holds the only other ends, and its death closes them
        last_words.close()

    def poll(self) -> tuple[int, Measurement | None]:
        """Tokens trained since the last poll, and the result once it is there.

        Raises:
            KizzasiError: what ended the trial is no fault of it, such as a full disk.
        """
        before, measured = self.tokens, None
        try:
            while measured is None and self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, KizzasiError):
                    raise message
                if isinstance(message, Measurement):
                    measured = message
                elif isinstance(message, str):
                    measured = failed(message)
                    self.close()  # with what a failed allocation or kernel left behind
                else:
                    self.began, self.stillborn = self.began or time.monotonic(), False
                    self.tokens += message
        except (EOFError, OSError):
            measured = failed(self._cause_of_death())
        seconds = self.limits.seconds
        if measured is None and seconds and self.began and time.monotonic() - self.began > seconds:
            measured = failed(
                f"took longer than {seconds:g} s, the limit of a trial, and was stopped after "
                f"{self.tokens} tokens\n{self._stop()}"
            )
        return self.tokens - before, measured

    def _cause_of_death(self) -> str:
        assert self.process is not None
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        outside = code == -signal.SIGKILL
        if self.began is None and (self.stillborn or not outside):
            script = "Search under `if __name__ == '__main__':`"
            if getattr(sys.modules["__main__"], "__file__", None) == "<stdin>":
                script = "From stdin it can start none: save it to a file, or use workers=1"
            raise StudyError(
                f"a worker process ended before its first trial ({cause}). Out of memory? Use "
                f"fewer --workers and --resume. A script? {script}"
            )
        if outside:
            self.killed, self.stillborn = True, self.began is None
            cause += " (out of memory? then use fewer --workers)"
        return f"the trial's process died: {cause}\n{self._read_last_words()}"

    def _stop(self) -> str:
        """End a process that hangs. Returns where it was, as far as it could still tell."""
        assert self.process is not None
        if os.name == "posix" and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGABRT)  # faulthandler writes a traceback
            self.process.join(1)
        self.close()
        return self._read_last_words()

    def _read_last_words(self) -> str:
        if os.name != "posix":
            return ""
        os.set_blocking(self.last_words.fileno(), False)
        try:
            return os.read(self.last_words.fileno(), LAST_WORDS).decode(errors="replace")
        except BlockingIOError:  # another process inherited the pipe
            return ""

    def close(self) -> None:
        """Kill the process. A checkpoint is written in one move, so nothing finished is lost."""
        if self.process is not None and self.process.pid is not None:  # it may never have started
            self.process.kill()
            self.process.join()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What begins meanwhile never hears Ctrl-C, not even while it imports: its parent does."""
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # which would let it through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(
    connection: Connection,
    last_words: Connection,
    evaluator: Evaluator,
    n_threads: int,
    limits: Limits,
) -> None:
    """What a worker's process does, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    if os.name == "posix":
        faulthandler.enable(last_words.fileno(), all_threads=False)
        _no_core_dumps()
    if sys.platform == "linux":
        # Short of memory, the kernel takes a trial and not the search.
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(n_threads)
    send = _sender(connection)
    while True:
        try:
            job: Job = connection.recv()
        except (EOFError, ConnectionError):
            return
        send(0)
        try:
            with _memory_limit(limits.memory_bytes, job.device):
                answer = evaluate(evaluator, job, send)
        except USERS_ERRORS as error:
            answer = error
        except EXPLOSIONS:
            answer = traceback.format_exc(INNERMOST_FRAMES)
        send(answer)


def _sender(connection: Connection) -> Callable[[object], None]:
    """What tells the parent; one that was killed hears nothing, and that is no fault of a trial."""

    def send(message: object) -> None:
        try:
            connection.send(message)
        except ConnectionError:
            os._exit(1)

    return send


def _no_core_dumps() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def _memory_limit(memory_bytes: int | None, device: str) -> Iterator[None]:
    """Let allocations beyond the limit fail, with a traceback."""
    if memory_bytes is None:
        yield
    elif device != "cpu":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total), device)
        yield
    else:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
        limit = pages * resource.getpagesize() + memory_bytes
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
