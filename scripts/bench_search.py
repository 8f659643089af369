"""What a search costs beside its trainings: CPU time and memory of a trial, as trials add up.

A whole search over the ready-made space of hybrids: proposals, bounds, digests, the scheduler, the
journal, the final trainings and the report. Its training function returns at once, on eight
simulated workers. CPU is that of this process without the time that waits for the disk. Memory is
what the process holds beyond what it held before the search.

With --trainings, instead: real micro-trainings of a tiny model, and how the memory of the process
grows a training, by a line fitted to the second half of the samples: resident memory, and what
Python itself holds (tracemalloc).

example:
  python scripts/bench_search.py --trials 10000
  python scripts/bench_search.py --trainings 1000
  python scripts/bench_search.py --trials 1000 --searches random --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kizzasi.models import Tokens
from kizzasi.nas import ASHA, Finals, Halving, Random, RegularizedEvolution, Search
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.executors import run_job
from kizzasi.nas.executors.simulated import Simulated
from kizzasi.nas.spaces.families import model_spec
from kizzasi.nas.spaces.ready_made import read_space
from kizzasi.nas.study.study import Study
from kizzasi.train.bytes import load_corpus
from kizzasi.train.recipe import Recipe

COUNTS = (1000, 3000, 10_000, 30_000, 100_000)
RUNGS, ETA, PLACES = (9, 27, 81), 3, 8
TRIALS_EACH = 1 + 1 / ETA + 1 / ETA**2  # of a candidate, on average
CURVE = tuple((i * 5120, 3.0) for i in range(20))


def train(job: Job, report: object) -> Measurement:
    """A score that depends on the model and on how long it was trained, at once."""
    chance = zlib.crc32(f"{job.key.partition('-')[0]}".encode()) / 2**32
    return Measurement(chance + 1 / job.budget, job.budget, 3.0, 32_768.0, CURVE)


def seconds(job: Job) -> float:
    return job.budget * (1 + zlib.crc32(job.key.encode()) / 2**32)


def regularized(n: int) -> dict[str, Any]:
    return {
        "searcher": RegularizedEvolution(50, 10, n, 0.1, 0),
        "scheduler": ASHA(n, RUNGS[0], RUNGS[-1], ETA),
    }


def random(n: int) -> dict[str, Any]:
    return {"searcher": Random(n, 0, distinct=True), "scheduler": Halving(RUNGS, 1 / ETA)}


SEARCHES: dict[str, Callable[[int], dict[str, Any]]] = {
    "regularized": regularized,
    "random": random,
}


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def measured(name: str, n_trials: int) -> dict[str, Any]:
    """A search in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return measured_in(Path(folder), name, n_trials)


def measured_in(folder: Path, name: str, n_trials: int) -> dict[str, Any]:
    """Milliseconds and KiB a trial between counts of trials, and those of the end."""
    n = round(n_trials / TRIALS_EACH)
    search = Search(
        read_space("hybrid", Tokens(256), 200_000),
        train,
        metric="loss",
        executor=lambda evaluator: Simulated(evaluator, PLACES, seconds),
        finals=Finals(n=3, budget=RUNGS[-1], seeds=3),
        folder=folder / name,
        **SEARCHES[name](n),
    )
    marks: list[tuple[int, float, int]] = []
    wanted = [0, *(count for count in COUNTS if count < 0.95 * n_trials)]
    append, done = Study.append, 0

    def counted(self: Study, event: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        if done == next(iter(wanted), None):
            marks.append((wanted.pop(0), time.process_time(), resident_kib()))
        done += event["event"] == "trial" and event["rung"].isdigit()
        if event["event"] == "trial" and event["rung"] == "final" and len(wanted) == 0:
            wanted.append(-1)
            marks.append((done, time.process_time(), resident_kib()))
        return append(self, event)

    Study.append = counted
    try:
        search.run()
    finally:
        Study.append = append
    end, kib = time.process_time(), resident_kib()
    rows = [
        {
            "trials": after[0],
            "ms_per_trial": 1000 * (after[1] - before[1]) / (after[0] - before[0]),
            "kib_per_trial": (after[2] - before[2]) / (after[0] - before[0]),
        }
        for before, after in itertools.pairwise(marks)
    ]
    first, last = marks[0], marks[-1]
    start = time.process_time()
    search.run(resume=True)
    return {
        "search": name,
        "candidates": n,
        "rows": rows,
        "ms_per_trial": 1000 * (last[1] - first[1]) / last[0],
        "kib_per_trial": (last[2] - first[2]) / last[0],
        "end_seconds": end - last[1],
        "end_mib": (kib - last[2]) / 1024,
        "resume_seconds": time.process_time() - start,
        "journal_bytes": (folder / name / "journal.jsonl").stat().st_size,
    }


def trainings(n: int) -> dict[str, float]:
    """KiB that a micro-training leaves behind."""
    evaluator = MicroTrain(
        load_corpus(None), Recipe(128, seq_len=32, batch_size=4, score_windows=4)
    )
    sizes = {"d_model": 16, "d_state": 8, "n_layers": 1, "expand_factor": 1.0, "dropout": 0.0}
    spec = model_spec("transformer", vocab_size=256, **sizes)
    tokens, resident, held = evaluator.recipe.tokens_per_step, list[float](), list[float]()
    tracemalloc.start()
    for seed in range(n):
        job = Job(spec, tokens, seed, {"lr": 1e-3}, tokens)
        assert run_job(evaluator, job, lambda _: None).failure is None
        resident.append(resident_kib())
        held.append(tracemalloc.get_traced_memory()[0] / 1024)
    tracemalloc.stop()

    def slope(samples: list[float]) -> float:
        half = samples[len(samples) // 2 :]
        return float(np.polyfit(range(len(half)), half, 1)[0])

    return {
        "trainings": n,
        "rss_kib_per_training": slope(resident),
        "python_kib_per_training": slope(held),
        "rss_first_mib": resident[0] / 1024,
        "rss_last_mib": resident[-1] / 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000, help="about as many (10000)")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--trainings", type=int, metavar="N", help="so many micro-trainings")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()
    if args.trials < 100:
        parser.error("--trials must be at least 100")
    if args.trainings is not None and args.trainings < 4:
        parser.error("--trainings must be at least 4")
    if sys.platform != "linux":
        parser.error("the memory of a process is read from /proc, which needs Linux")
    if args.trainings is not None:
        memory = trainings(args.trainings)
        lines = (f"{name:24}{value:12.4g}" for name, value in memory.items())
        print(json.dumps(memory) if args.json else "\n".join(lines))
        return 0
    found = []
    for name in args.searches:  # each in a process of its own, so that memory is its own
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measured, (name, args.trials)))
            pool.close()  # leaving the pool alone would kill the process with its locks unreturned
            pool.join()
    if args.json:
        print(json.dumps(found))
        return 0
    for one in found:
        print(f"{one['search']}: {one['candidates']} candidates")
        print(f"  {'trials up to':>14}{'ms a trial':>12}{'KiB a trial':>13}")
        for row in one["rows"]:
            print(f"  {row['trials']:14}{row['ms_per_trial']:12.3f}{row['kib_per_trial']:13.2f}")
        print(f"  {'in all':>14}{one['ms_per_trial']:12.3f}{one['kib_per_trial']:13.2f}")
        print(
            f"  finals and report {one['end_seconds']:.1f} s and {one['end_mib']:.0f} MiB, "
            f"resumed in {one['resume_seconds']:.1f} s, "
            f"journal {one['journal_bytes'] / 2**20:.1f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
