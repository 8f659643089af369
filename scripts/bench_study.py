"""What a study costs beside its trainings: milliseconds a trial, and memory over many trials.

The first part runs trials that do nothing through a real study: every trial is a new candidate,
and both are in the journal, on the disk, before the next one begins. The time that the disk takes
(fsync) is shown apart. The second part runs real micro-trainings of a tiny model and shows how the
memory of the process grows a trial, by a line fitted to the second half of the samples: resident
memory, and what Python itself holds (tracemalloc).

example:
  python scripts/bench_study.py --trials 10000 --trainings 1000
  python scripts/bench_study.py --trials 500 --trainings 60 --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.micro_training import Measurement, MicroTrain
from kizzasi.nas.executors import InProcess, Job, run_job
from kizzasi.nas.spaces.families import model_spec
from kizzasi.nas.study.journal import Journal
from kizzasi.nas.study.study import Entry, Study, Trial
from kizzasi.train.bytes import load_corpus
from kizzasi.train.recipe import Recipe

TARGET_MS = 2.0
PAGE = os.sysconf("SC_PAGE_SIZE")
MEASURED = Measurement(2.5, 98_304, 3.0, 32_768.0, tuple((i * 5120, 3.0) for i in range(20)))


@dataclass(frozen=True)
class Nothing(MicroTrain):
    """An evaluator that returns at once, with a curve of the usual length."""

    def __call__(self, *_: Any, **__: Any) -> Measurement:
        return MEASURED


def tiny() -> ModelSpec:
    return model_spec(
        "transformer",
        vocab_size=256,
        d_model=16,
        d_state=8,
        n_layers=1,
        expand_factor=1.0,
        dropout=0.0,
    )


def overhead(n: int, folder: Path, evaluator: MicroTrain) -> dict[str, float]:
    """Milliseconds a trial in all, in fsync, and without it; of the first and the last tenth."""
    synced, fsync = 0.0, os.fsync

    def timed_fsync(descriptor: int) -> None:
        nonlocal synced
        start = time.perf_counter()
        fsync(descriptor)
        synced += time.perf_counter() - start

    spec, stamps = tiny(), [0.0]
    os.fsync = timed_fsync
    try:
        with Journal(folder / "journal.jsonl") as journal, tqdm(total=n, desc="study") as bar:
            study = Study(folder, journal, InProcess(evaluator), bar)
            for i in range(n):
                start = time.perf_counter()
                before = synced
                own = replace(spec, dropout=i / n / 2)  # a spec, and a digest, of its own
                entry = Entry(own.digest[:12], "random", "none", "none", own, 0.0, 1, 1, 1)
                study.once("candidate", entry.to_event, id=entry.id)
                trial = Trial(entry, "0", 0, {"lr": 1e-3}, 98_304, 98_304)
                study.run([trial])
                study.forget([trial])
                stamps.append(time.perf_counter() - start - (synced - before))
                bar.update()
    finally:
        os.fsync = fsync
    own_ms, tenth = 1000 * np.array(stamps[1:]), max(1, n // 10)
    start = time.perf_counter()
    Journal(folder / "journal.jsonl").close()
    return {
        "trials": n,
        "ms_per_trial": float(own_ms.mean()) + 1000 * synced / n,
        "fsync_ms": 1000 * synced / n,
        "study_ms": float(own_ms.mean()),
        "study_ms_first_tenth": float(own_ms[:tenth].mean()),
        "study_ms_last_tenth": float(own_ms[-tenth:].mean()),
        "reopen_seconds": time.perf_counter() - start,
        "journal_bytes": (folder / "journal.jsonl").stat().st_size,
    }


def memory(n: int, evaluator: MicroTrain) -> dict[str, float]:
    """KiB that a micro-training leaves behind."""
    spec, resident, held = tiny(), [], []
    tokens = evaluator.recipe.tokens_per_step
    tracemalloc.start()
    for seed in tqdm(range(n), desc="memory"):
        job = Job(spec, tokens, seed, {"lr": 1e-3}, tokens)
        assert run_job(evaluator, job, lambda _: None).failure is None
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1024)
        held.append(tracemalloc.get_traced_memory()[0] / 1024)
    tracemalloc.stop()

    def slope(samples: list[float]) -> float:
        half = samples[len(samples) // 2 :]
        return float(np.polyfit(range(len(half)), half, 1)[0])

    return {
        "trainings": n,
        "rss_kib_per_trial": slope(resident),
        "python_kib_per_trial": slope(held),
        "rss_first_mib": resident[0] / 1024,
        "rss_last_mib": resident[-1] / 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000, help="of no work (10000)")
    parser.add_argument("--trainings", type=int, default=1_000, help="of one step each (1000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()
    if args.trials < 1 or args.trainings < 4:
        parser.error("--trials must be at least 1 and --trainings at least 4")
    if sys.platform != "linux":
        parser.error("the memory of a process is read from /proc, which needs Linux")
    recipe = Recipe(128, seq_len=32, batch_size=4, score_windows=4)
    corpus = load_corpus(None)
    with tempfile.TemporaryDirectory() as folder:
        study = overhead(args.trials, Path(folder), Nothing(corpus, recipe))
    result = {"study": study, "memory": memory(args.trainings, MicroTrain(corpus, recipe))}
    if args.json:
        print(json.dumps(result))
        return 0
    for part, numbers in result.items():
        print(part)
        for name, value in numbers.items():
            print(f"  {name:24}{value:12.4g}")
    verdict = "within" if study["study_ms"] < TARGET_MS else "ABOVE"
    print(f"{verdict} the target of {TARGET_MS:g} ms a trial, fsync apart")
    return 0


if __name__ == "__main__":
    sys.exit(main())
