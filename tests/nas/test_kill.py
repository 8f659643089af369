"""kill -9 at random moments, on every executor: no finished trial is lost or repeated, the result
is that of the uninterrupted run, no process stays behind, and the run's lock is free at once."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_search import SPACE, config, outcome, write_text

from kizzasi.models import load
from kizzasi.nas.search import named_search
from kizzasi.nas.study.journal import Journal

# Imports once and forks for every search, which then starts at once.
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.search import SearchConfig, named_search
torch.set_num_threads(1)
if __name__ == "__main__":
    for line in sys.stdin:
        config, space, folder, executor = json.loads(line)
        config, space = SearchConfig.from_dict(config), ArchSearchSpace(**space)
        threads = None if executor == "in-process" else 1
        options = {"executor": executor, "threads": threads, "resume": True}
        if (pid := os.fork()) == 0:
            try:
                named_search(config, Path(folder), space, **options)
                os._exit(0)
            finally:
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
GONE_SECONDS = 60
# They hold nothing of a search, and notice after a minute that their node is gone.
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    named_search(config(data), folder, SPACE)
    return folder


@pytest.fixture(scope="module")
def starter():
    # Ray's usual niceness of 15 would starve its workers on a busy machine.
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ray},
    ) as process:
        yield process
        process.stdin.close()


def parents() -> dict[int, tuple[int, str]]:
    """pid -> (pid of the parent, time of birth), for every process that is not a zombie."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                found[int(folder.name)] = int(fields[1]), fields[19]
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return "gone by now"


def descendants(pid: int) -> set[tuple[int, str]]:
    """(pid, time of birth) of all that a process has started."""
    family, known = {pid}, parents()
    while born := {p for p, (parent, _) in known.items() if parent in family} - family:
        family |= born
    return {(p, known[p][1]) for p in family & known.keys()}


def start(starter, folder: Path, data: str, executor: str) -> int:
    space = {k: list(v) for k, v in vars(SPACE).items()}
    task = [config(data).to_dict(), space, str(folder), executor]
    starter.stdin.write(json.dumps(task) + "\n")
    starter.stdin.flush()
    return int(starter.stdout.readline())


def kill_at_a_moment(starter, pid: int, journal: Path, chance: random.Random) -> bool:
    """Kill a search between its next three events. Returns False if it was already over."""

    def size() -> int:
        return journal.stat().st_size if journal.exists() else 0

    for _ in range(chance.choice((1, 2, 3))):
        before = size()
        while size() == before and Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
    time.sleep(chance.random() * 0.4)
    family = descendants(pid)
    if family:
        os.kill(pid, signal.SIGKILL)
    killed = int(starter.stdout.readline()) == -signal.SIGKILL
    if killed:
        Journal(journal).close()  # raises while another process holds the lock
    patience = time.monotonic() + GONE_SECONDS
    while left := [
        command(p)
        for p, (_, born) in parents().items()
        if (p, born) in family and not command(p).startswith(RAYS_OWN)
    ]:
        assert time.monotonic() < patience, f"still there: {left}"
        time.sleep(0.1)
    return killed


def check_kills(starter, finished, data, folder, executor, n_kills, at_most) -> None:
    chance, kills = random.Random(n_kills), 0
    while kills < n_kills:
        run, in_this_run = folder / str(kills), 0
        while in_this_run < at_most and kills < n_kills:
            pid = start(starter, run, data, executor)
            if not kill_at_a_moment(starter, pid, run / "journal.jsonl", chance):
                break
            in_this_run, kills = in_this_run + 1, kills + 1
        start(starter, run, data, executor)
        assert int(starter.stdout.readline()) == 0
        assert outcome(run) == outcome(finished)
        assert load(run / "best").spec == load(finished / "best").spec
        assert list((run / "trials").glob("*.pt")) == []
        print(f"{executor}: {in_this_run} kills in one run, {kills} in all", flush=True)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
no_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")


@linux
@pytest.mark.parametrize(("executor", "n"), [("in-process", 2), ("processes", 1)])
def test_a_few_kills(starter, finished, data, tmp_path, executor, n):
    check_kills(starter, finished, data, tmp_path, executor, n, n)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("executor", ["in-process", "processes", pytest.param("ray", marks=no_ray)])
def test_twenty_kills(starter, finished, data, tmp_path, executor):
    check_kills(starter, finished, data, tmp_path, executor, 20, 7)
