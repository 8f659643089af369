"""Executors: a trial that explodes is recorded with its reason, and the search goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import kizzasi
from kizzasi.errors import ShapeError, SpecError, StudyError
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.executors import InProcess, Limits, Processes, open_executor
from kizzasi.nas.executors.ray import _connect
from kizzasi.nas.executors.worker import _sender
from kizzasi.train.recipe import Recipe


def allocate() -> None:
    torch.ones(2**28)


def loop_for_ever() -> None:
    while True:
        pass


def raise_shape_error() -> None:
    raise ShapeError("x: (3,), expected (4,)")


BOMBS = {
    "raise": raise_shape_error,
    "memory": allocate,
    "abort": os.abort,
    "hang": loop_for_ever,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangup": lambda: os.kill(os.getpid(), signal.SIGHUP),
    "exit": lambda: sys.exit(3),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),  # Ctrl-C reaches every process
}


@dataclass(frozen=True)
class Mined(MicroTrain):
    """Explodes when a job's spec names a bomb; else reports its threads and device."""

    def __call__(self, job, report):
        report(job.budget)
        BOMBS.get(job.spec, lambda: None)()
        return Measurement(float(job.seed), torch.get_num_threads(), failure=job.device)


def evaluator() -> Mined:
    return Mined(None, Recipe(512))


def job(bomb: str, seed: int = 0) -> Job:
    return Job(bomb, 8, seed, key=f"{bomb}{seed}")


def failures(executor, *bombs: str) -> dict[str, str]:
    jobs = [job(bomb) for bomb in bombs]
    with executor, tqdm(disable=True) as bar:
        found = {job.spec: m for job, m in executor.run([*jobs, job("fine", 7)], bar)}
        assert found.pop("fine").score == 7
        assert found.keys() == set(bombs)
    assert all(m.score is None for m in found.values())
    return {bomb: m.failure for bomb, m in found.items()}


def test_a_worker_has_its_threads_and_survives_ctrl_c_and_its_trials_have_limits():
    limits = Limits(seconds=1.0, memory_bytes=2**28)
    executor = Processes(evaluator(), 1, 3, limits)
    with executor, tqdm(disable=True) as bar:
        jobs = [job(bomb) for bomb in ("interrupt", "fine", "memory", "hang")]
        found = {job.spec: m for job, m in executor.run([*jobs, job("last", 7)], bar)}
    assert found["interrupt"].spent == found["fine"].spent == 3
    assert found["last"].score == 7
    assert "Traceback" in found["memory"].failure
    assert "can't allocate memory" in found["memory"].failure
    assert "longer than 1 s, the limit of a trial" in found["hang"].failure
    assert "after 8 tokens" in found["hang"].failure
    assert "in loop_for_ever" in found["hang"].failure
    assert not any(worker.process.is_alive() for worker in executor.workers)


def test_a_worker_hears_no_ctrl_c_while_it_imports(capfd):
    (worker,) = Processes(evaluator(), 1, 1).workers
    worker.submit(job("fine", 7))
    measured = None
    while measured is None:
        if worker.began is None:
            os.kill(worker.process.pid, signal.SIGINT)
        time.sleep(0.05)
        _, measured = worker.poll()
    worker.close()
    assert measured.score == 7
    assert capfd.readouterr().err == ""


@dataclass(frozen=True)
class KilledOnce(Mined):
    """Killed from outside the first time that a trial named so runs."""

    seen: str = ""

    def __call__(self, job, report):
        report(job.budget)
        if job.spec == "killed" and not os.path.exists(self.seen):
            open(self.seen, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return Measurement(float(job.seed))


def test_a_trial_killed_from_outside_is_tried_again_alone(tmp_path):
    executor = Processes(KilledOnce(None, Recipe(512), seen=str(tmp_path / "seen")), 1, 1)
    with executor, tqdm(disable=True) as bar:
        found = {j.key: m for j, m in executor.run([job("killed", 3), job("fine", 7)], bar)}
    assert list(found) == ["fine7", "killed3"], "the killed one comes last"
    assert [m.score for m in found.values()] == [7.0, 3.0]
    assert (tmp_path / "seen").exists()


@pytest.mark.parametrize(("script", "told"), [("<stdin>", "workers=1"), ("a.py", "__main__")])
def test_a_worker_that_never_began_says_what_may_be_the_reason(monkeypatch, script, told):
    worker = Processes(evaluator(), 1, 1).workers[0]
    worker.process = SimpleNamespace(join=lambda: None, exitcode=1)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", script, raising=False)
    with pytest.raises(StudyError, match=rf"exit code 1.*{told}"):
        worker._cause_of_death()


def test_a_worker_killed_from_outside_before_its_first_trial_has_one_more_try():
    """Once, the search ended: whoever killed it may have meant the memory that two of them took."""
    with Processes(evaluator(), 1, 1) as executor, tqdm(disable=True) as bar:
        (worker,) = executor.workers
        executor.submit(job("fine", 7))
        worker.process.kill()
        assert [m.score for _, m in [executor.collect(bar)]] == [7.0]
        assert not worker.stillborn
    worker = Processes(evaluator(), 1, 1).workers[0]
    worker.process = SimpleNamespace(join=lambda: None, exitcode=-signal.SIGKILL)
    worker.stillborn = True
    with pytest.raises(StudyError, match=r"before its first trial .signal SIGKILL"):
        worker._cause_of_death()


def test_a_worker_whose_parent_was_killed_leaves_without_a_word(monkeypatch, capfd):
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit, match="1"):
        _sender(theirs)("a result")
    assert capfd.readouterr() == ("", "")


ORPHAN = """
import multiprocessing, os, signal, sys, time
from kizzasi.children import Child

class Slow:  # to read, as arguments are whose modules import torch
    def __setstate__(self, state):
        with open(sys.argv[1], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)

if __name__ == "__main__":
    slow = Slow()
    slow.made = True
    context = multiprocessing.get_context("spawn")
    context.Process(target=Child("time:sleep", os.getpid()), args=(slow,), daemon=True).start()
    while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_worker_whose_parent_is_killed_while_it_imports_leaves_too(tmp_path):
    """It stayed until its imports were done, on a busy machine more than a minute."""
    script, told = tmp_path / "orphan.py", tmp_path / "pid"
    script.write_text(ORPHAN)
    here = {**os.environ, "PYTHONPATH": str(Path(kizzasi.__file__).parents[1])}
    subprocess.run([sys.executable, script, told], env=here, stdin=subprocess.DEVNULL)
    pid, patience = told.read_text(), time.monotonic() + 30
    while os.path.isdir(f"/proc/{pid}") and time.monotonic() < patience:
        time.sleep(0.02)
    assert not os.path.isdir(f"/proc/{pid}")


@pytest.mark.slow
def test_every_way_to_explode():
    found = failures(Processes(evaluator(), 2, 1), "kill", "raise", "exit", "abort", "hangup")
    assert "signal SIGKILL (out of memory?" in found["kill"]
    assert "exit code 3" in found["exit"]
    assert "signal SIGABRT" in found["abort"]
    assert "in __call__" in found["abort"]
    assert "x: (3,), expected (4,)" in found["raise"]
    assert "in raise_shape_error" in found["raise"]
    assert "signal SIGHUP" in found["hangup"]


def test_in_process_records_exceptions():
    assert "in raise_shape_error" in failures(InProcess(evaluator()), "raise")["raise"]


def test_workers_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    workers = Processes(evaluator(), 3, device="cuda").workers
    assert [w.device for w in workers] == ["cuda:0", "cuda:1", "cuda:0"]
    assert Processes(evaluator(), 1, device="cuda:1").workers[0].device == "cuda:1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "in-process", "limits": Limits(1.0)}, "use --executor processes"),
        ({"kind": "in-process", "threads": 2}, "use --executor processes"),
        ({"kind": "in-process", "workers": 2}, "use --executor processes"),
        ({"address": "auto"}, "address: auto is of a Ray cluster"),
        ({"limits": Limits(seconds=0)}, "trial seconds: 0 must be above 0"),
        ({"limits": Limits(memory_bytes=-1)}, "trial memory: -1 bytes"),
        ({"workers": 0}, "workers: 0 must be at least 1"),
        ({"threads": -1}, "threads: -1 must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(SpecError, match=message):
        open_executor(evaluator(), **options)


def test_the_executor_that_is_meant(monkeypatch):
    assert isinstance(open_executor(evaluator(), workers=1), InProcess)
    assert isinstance(open_executor(evaluator(), device="cuda:0"), InProcess)
    assert isinstance(open_executor(evaluator(), workers=1, limits=Limits(9.0)), Processes)
    assert len(open_executor(evaluator(), workers=3).workers) == 3
    assert len(open_executor(evaluator(), workers=2, device="cuda:0").workers) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert len(open_executor(evaluator(), device="cuda").workers) == 8, "GPUs stand idle"


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=r"pip install 'kizzasi-models\[ray\]'"):
        open_executor(evaluator(), "ray")


@dataclass(frozen=True)
class Unloadable(MicroTrain):
    def __reduce__(self):
        return sys.exit, (5,)


@pytest.mark.slow
def test_a_worker_that_cannot_start_ends_the_study():
    executor = Processes(Unloadable(None, Recipe(512)), 1)
    with (
        executor,
        tqdm(disable=True) as bar,
        pytest.raises(StudyError, match=r"ended before its first trial \(exit code 5\)"),
    ):
        list(executor.run([job("fine")], bar))


@dataclass(frozen=True)
class FullDisk(Mined):
    def __call__(self, job, report):
        raise OSError(28, os.strerror(28))


@pytest.mark.parametrize(
    "make", [InProcess, pytest.param(lambda e: Processes(e, 1), marks=pytest.mark.slow)]
)
def test_a_full_disk_is_no_fault_of_the_trial(make):
    with (
        make(FullDisk(None, Recipe(512))) as executor,
        tqdm(disable=True) as bar,
        pytest.raises(StudyError, match="No space left on device; make room"),
    ):
        list(executor.run([job("fine")], bar))


def test_a_ray_that_does_not_start_is_one_line():
    def init(*_, **__):
        raise Exception("The current node timed out during startup.\nmore")

    with pytest.raises(StudyError, match=r"local: The current node timed out .*; start a cluster"):
        _connect(SimpleNamespace(init=init), "local")
