"""What a search costs beside its trainings does not grow with it; scripts/bench_search.py has more.

Counted in function calls and in bytes that Python holds, neither of which a busy machine changes.
"""

import cProfile
import pstats
import tracemalloc
import zlib
from pathlib import Path

import pytest

from kizzasi.models import Signal
from kizzasi.nas import (
    ASHA,
    Finals,
    Halving,
    ModelSpace,
    Random,
    RegularizedEvolution,
    Search,
    choice,
    repeat,
)
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.executors.simulated import Simulated
from kizzasi.nas.study.run import Run

BLOCK = {"mixer": {"kind": "mamba", "d_state": choice(*range(1, 17))}}
SPACE = ModelSpace({"d_model": choice(8, 12), "stem": Signal(1, 1), "blocks": repeat(BLOCK, 3, 4)})
CURVE = tuple((i * 5120, 3.0) for i in range(20))
FEW, MANY = 80, 160


def train(job: Job, report: object) -> Measurement:
    score = zlib.crc32(job.spec.digest.encode()) / 2**32 + 1 / job.budget
    return Measurement(score, job.budget, 1.0, 1.0, CURVE)


SEARCHES = {
    "regularized": lambda n: (RegularizedEvolution(10, 4, n, 0.3, 0), ASHA(n, 9, 81)),
    "random": lambda n: (Random(n, 0, distinct=True), Halving((9, 27, 81), 0.34)),
}


class EndError(Exception):
    """The rungs are done; what comes then is another matter."""


@pytest.fixture
def climb(tmp_path, monkeypatch):
    def stop(self):
        raise EndError

    def climb(name: str, n: int, at_end=lambda: None) -> int:
        """Until the rungs are done; the number of trials."""
        folder: Path = tmp_path / str(len(list(tmp_path.iterdir())))
        searcher, scheduler = SEARCHES[name](n)
        search = Search(
            SPACE,
            train,
            metric="loss",
            searcher=searcher,
            scheduler=scheduler,
            finals=Finals(n=1, budget=9, seeds=1),
            executor=lambda evaluator: Simulated(evaluator, 4, lambda job: job.budget),
            folder=folder,
        )
        with monkeypatch.context() as patch:
            patch.setattr(Run, "train_finalists", lambda self: at_end() or stop(self))
            with pytest.raises(EndError):
                search.run()
        return (folder / "journal.jsonl").read_text().count('"event":"trial"')

    return climb


@pytest.mark.parametrize("name", SEARCHES)
def test_calls_of_a_trial_do_not_grow_with_their_number(name, climb):
    climb(name, FEW)  # tables that are made once
    calls = []
    for n in (FEW, MANY):
        profile = cProfile.Profile()
        profile.enable()
        trials = climb(name, n)
        profile.disable()
        calls.append(pstats.Stats(profile).total_calls / trials)  # pyright: ignore[reportAttributeAccessIssue]
    assert calls[1] < 1.15 * calls[0]
    assert calls[1] < 3000


@pytest.mark.parametrize("name", SEARCHES)
def test_memory_of_a_trial_is_small(name, climb):
    held: list[int] = []
    climb(name, FEW)
    tracemalloc.start()
    trials = [
        climb(name, n, lambda: held.append(tracemalloc.get_traced_memory()[0])) for n in (FEW, MANY)
    ]
    tracemalloc.stop()
    assert (held[1] - held[0]) / (trials[1] - trials[0]) < 4 * 1024
