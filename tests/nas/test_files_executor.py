"""Workers that find trials in a folder: one worker a trial, dead ones replaced, results exact."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_search import SPACE, config, outcome, write_text
from tqdm import tqdm

from kizzasi.cli import main
from kizzasi.errors import SpecError, StudyError
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.mixers import MambaSpec
from kizzasi.nas import Job, Measurement, named_search
from kizzasi.nas.executors import Files, files, open_executor
from kizzasi.nas.executors.execute import NO_LIMITS, Limits, run_job
from kizzasi.nas.executors.files import job_data, job_of, measurement_of, serve

SPEC = ModelSpec(8, (BlockSpec(MambaSpec(d_state=4)),), Tokens(16))
BAR = tqdm(disable=True)


def jobs(folder, n=6):
    return [
        Job(SPEC, 10 * i, i, {"lr": 0.1}, 60, folder / "trials" / f"{i}.pt", key=str(i))
        for i in range(n)
    ]


class Here:
    """A Worker whose trials run in this process, at once."""

    killed = False

    def __init__(self, evaluator, n_threads, limits, device):
        self.evaluator, self.n_threads = evaluator, n_threads
        reading, writing = os.pipe()
        os.close(writing)
        self.connection = reading  # ready at any time

    def submit(self, job):
        self.job = job

    def poll(self):
        return self.job.budget, run_job(self.evaluator, self.job, lambda n: None)

    def close(self):
        pass


def here(evaluator, kind=Here) -> Any:
    return kind(evaluator, 1, None, "cpu")


def claimed(place) -> Path:
    taken = place.claim()
    assert taken is not None
    return taken


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(files, "POLL_SECONDS", 0.01)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(files, "Worker", Here)


def score(job, report):
    if job.seed == 3:
        raise ValueError("three")
    return Measurement(job.seed / 3, job.budget, curve=((1, 0.1), (2, math.nan)), values=(1.0, 2.0))


def served(folder, evaluator=score, n=2, **options):
    threads = [
        threading.Thread(target=serve, args=(folder, evaluator), kwargs=options) for _ in range(n)
    ]
    for thread in threads:
        thread.start()
    return threads


def test_jobs_and_results_come_through_json(tmp_path):
    parent = replace(jobs(tmp_path)[1], kind="train")
    job = replace(jobs(tmp_path)[2], parent=parent, split="test", kind="child")
    assert job_of(json.loads(json.dumps(job_data(job, tmp_path))), tmp_path) == job
    elsewhere = job_of(job_data(job, tmp_path), Path("/mnt"))
    assert elsewhere.checkpoint == Path("/mnt/trials/2.pt")
    measured = Measurement(1 / 3, 7, 0.1, 3.0, ((5, 0.1),), "why", (0.1, 0.2), {"a": [1]})
    assert measurement_of(json.loads(json.dumps(vars(measured)))) == measured
    for path in ("/etc/x.pt", "../x.pt"):
        with pytest.raises(StudyError, match="outside the run's folder"):
            job_of({**job_data(job, tmp_path), "checkpoint": path}, tmp_path)
    with pytest.raises(StudyError, match="no trial of this version"):
        job_of({"checkpoint": None, "parent": None, "spec": SPEC.to_dict(), "x": 1}, tmp_path)


@pytest.mark.usefixtures("in_process")
def test_every_trial_has_one_worker(tmp_path):
    began = []

    def counted(job, report):
        began.append(job.key)
        return score(job, report)

    with Files(score, tmp_path, 2) as owner:
        threads = served(tmp_path, counted, n=3, device="cuda:7")
        for job in jobs(tmp_path, 12):
            owner.submit(job)
        found = {job.key: measured for job, measured in (owner.collect(BAR) for _ in range(12))}
        assert {key: m.score for key, m in found.items()} == {
            str(i): None if i == 3 else i / 3 for i in range(12)
        }
        assert sorted(began, key=int) == [str(i) for i in range(12)]
        (failure,) = [m.failure for m in found.values() if m.failure]
        assert "ValueError: three" in failure
        assert math.isnan(found["0"].curve[1][1])
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not any(
        p for name in ("todo", "taken", "done") for p in (tmp_path / "queue" / name).iterdir()
    )


def taken_by_the_dead(queue, name="0000000.json"):
    """What is left of a worker that was killed."""
    os.rename(queue / "todo" / name, queue / "taken" / f"{name}~dead")


@pytest.mark.usefixtures("in_process")
def test_what_a_dead_worker_had_is_given_to_another(tmp_path):
    with Files(score, tmp_path, 2, lease_seconds=0.2) as owner:
        for job in jobs(tmp_path, 2):
            owner.submit(job)
        taken_by_the_dead(tmp_path / "queue")
        served(tmp_path)
        found = [owner.collect(BAR) for _ in range(2)]
        assert {m.score for _, m in found} == {0, 1 / 3}


def test_a_trial_that_kills_its_workers_fails(tmp_path):
    owner = Files(score, tmp_path, 1, lease_seconds=0.05)
    owner.submit(jobs(tmp_path)[0])
    found = []
    collecting = threading.Thread(target=lambda: found.append(owner.collect(BAR)))
    collecting.start()
    n = 0
    while collecting.is_alive():
        if (tmp_path / "queue" / "todo" / "0000000.json").exists():
            taken_by_the_dead(tmp_path / "queue")
            n += 1
        time.sleep(0.01)
    assert n == 4
    assert "went silent 4 times" in found[0][1].failure


@pytest.mark.usefixtures("in_process")
def test_a_worker_that_was_only_slow_gives_up_its_trial(tmp_path, monkeypatch):
    owner = Files(score, tmp_path, 1)
    owner.submit(jobs(tmp_path)[2])
    place = files._Here(tmp_path / "queue", tmp_path, "cpu", beat_seconds=0)
    taken, slow = claimed(place), here(score)
    assert place.claim() is None

    def poll():
        with suppress(FileNotFoundError):
            os.rename(taken, tmp_path / "queue" / "todo" / "0000000.json")
        return 1, None

    monkeypatch.setattr(slow, "poll", poll)
    assert place.run(slow, taken, owner.session) is False
    assert place.run(here(score), claimed(place), owner.session)
    assert owner.collect(BAR)[1].score == 2 / 3


def test_results_of_another_session_are_thrown_away(tmp_path):
    first = Files(score, tmp_path, 1)
    first.submit(jobs(tmp_path)[1])
    said = {"session": first.session, "worker": "w", "tokens": 1, "measurement": {}}
    (tmp_path / "queue" / "done" / "0000000.json").write_text(json.dumps(said))
    second = Files(score, tmp_path, 1)
    second.submit(jobs(tmp_path)[2])
    (tmp_path / "queue" / "done" / "0000000.json").write_text(json.dumps(said))  # a late one
    place = files._Here(tmp_path / "queue", tmp_path, "cpu", 5)
    assert second._received(tmp_path / "queue" / "done" / "0000000.json", BAR) is None
    place.run(here(score), claimed(place), second.session)
    assert second.collect(BAR)[1].score == 2 / 3


@pytest.mark.usefixtures("in_process")
def test_errors_of_users_end_the_search(tmp_path):
    class Full(Here):
        def poll(self):
            raise StudyError("no space left; make room")

    owner = Files(score, tmp_path, 1)
    owner.submit(jobs(tmp_path)[1])
    place = files._Here(tmp_path / "queue", tmp_path, "cpu", 5)
    place.run(here(score, Full), claimed(place), owner.session)
    with pytest.raises(StudyError, match="make room"):
        owner.collect(BAR)
    with pytest.raises(SpecError, match="the number of workers that will come"):
        open_executor(score, "files")


def test_a_worker_is_made_anew_when_the_search_is_another(tmp_path, monkeypatch):
    """A search that was killed comes back with other settings: no trial runs by the old ones."""
    made = []

    class Noted(Here):
        def __init__(self, evaluator, n_threads, limits, device):
            super().__init__(evaluator, n_threads, limits, device)
            made.append((n_threads, limits))

    monkeypatch.setattr(files, "Worker", Noted)
    first = Files(score, tmp_path, 1)
    for job in jobs(tmp_path, 2):
        first.submit(job)
    (thread,) = served(tmp_path, n=1)
    for _ in range(2):
        first.collect(BAR)
    limits = Limits(seconds=60)
    with Files(score, tmp_path, 1, n_threads=2, limits=limits) as second:
        second.submit(jobs(tmp_path)[1])
        assert second.collect(BAR)[1].score == 1 / 3
    thread.join(10)
    assert made == [(1, NO_LIMITS), (2, limits)]


def test_without_a_search_a_worker_gives_up(tmp_path, capsys):
    assert main(["worker", str(tmp_path), "--patience", "0.1"]) == 2
    assert "start it with --executor files" in capsys.readouterr().err
    assert serve(tmp_path, score, patience=0.05) == 0


def test_two_workers_and_a_kill(tmp_path, monkeypatch):
    """The command line's workers, one of them killed by kill -9 in the middle of a trial."""
    monkeypatch.setattr("kizzasi.nas.executors.Files", partial(Files, lease_seconds=15.0))
    small = {"n_best": 1, "n_random": 1, "n_outside": 0, "rungs": (512,), "final_tokens": 512}
    own = replace(config(write_text(tmp_path)), side_by_side=2, lrs=(3e-3,), **small)
    named_search(own, tmp_path / "alone", SPACE)
    folder, environment = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kizzasi.cli", "worker", str(folder)]
    workers = [subprocess.Popen(command, env=environment) for _ in range(2)]
    killed = []

    def kill_one():
        while not killed:
            for path in (folder / "queue" / "taken").glob("*~*"):
                if path.name.rsplit("-", 2)[1] == str(workers[0].pid):
                    workers[0].send_signal(signal.SIGKILL)
                    killed.append(path.name)
            time.sleep(0.01)

    killing = threading.Thread(target=kill_one, daemon=True)
    killing.start()
    named_search(own, folder, SPACE, executor="files", workers=2)
    assert killed
    assert workers[1].wait(60) == 0
    assert workers[0].wait(60) == -signal.SIGKILL
    assert outcome(folder) == outcome(tmp_path / "alone")
