"""Compare schedulers on simulated learning curves whose best candidate is known.

The best candidate of a study is trained on in full; if it fails on the way, the next best takes its
place. Regret is how far the true loss of the one that comes through is from the best there is, in
bits per byte. Steps are what was spent, those last trainings included, in full trainings; "1st
fails" counts the studies whose best candidate failed there. Nothing is really trained.

    python scripts/bench_schedulers.py
    python scripts/bench_schedulers.py --seed 2000 --seeds 100 --families late noisy --json

The settings of "PDH from 27" and the candidates that it and "stopping from 27" take, so that they
cost about as much as stopping ASHA, were chosen on seeds 1000 to 1199.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from typing import Any

from kizzasi.nas.schedulers import (
    ASHA,
    PASHA,
    PDH,
    Extrapolated,
    Halving,
    Hyperband,
    Instalment,
    Schedule,
    Scheduler,
    StoppingASHA,
)
from kizzasi.nas.schedulers.schedule import FAILED
from kizzasi.nas.schedulers.simulate import SimulatedCurves, SimulatedTrainings, run_workers
from kizzasi.nas.searchers import AskTell, Grid
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.train.seeds import derive_seed

BUDGETS = (9, 27, 81, 243, 729)
SMALLEST, FULL = BUDGETS[0], BUDGETS[-1]
N = 143  # candidates; as many as Hyperband takes for these budgets
NOISE = 0.02
FAMILIES: dict[str, dict[str, float]] = {
    "steady": {"late": 0.0, "noise": NOISE},
    "late": {"late": 0.05, "noise": NOISE},
    "noisy": {"late": 0.05, "noise": 0.3},
    "failing": {"late": 0.05, "noise": NOISE, "crashing": 0.2, "diverging": 0.2},
}
SCHEDULERS: dict[str, Scheduler] = {
    "all in full": Halving((FULL,), 3, N),
    "halving": Halving(BUDGETS, 3, N),
    "Hyperband": Hyperband(SMALLEST, FULL),
    "ASHA": ASHA(N, SMALLEST, FULL),
    "ASHA, expected": Extrapolated(ASHA(N, SMALLEST, FULL)),
    "halving, expected": Extrapolated(Halving(BUDGETS, 3, N)),
    "ASHA, stopping": StoppingASHA(N, SMALLEST, FULL),
    "stopping from 27": StoppingASHA(100, 27, 243),
    "PASHA": PASHA(N, SMALLEST, FULL),
    "PASHA, 0.04": PASHA(N, SMALLEST, FULL, epsilon=2 * NOISE),
    "PDH from 9": PDH(N, BUDGETS, generation=24, population_size=48),
    "PDH from 27": PDH(80, (27, 81, 243), generation=8, population_size=24),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="studies per cell (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first study (0)")
    parser.add_argument("--workers", type=int, default=1, help="simulated workers (1)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--json", action="store_true", help="print JSON, every study with it")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.workers < 1 or arguments.seed < 0:
        parser.error("--seeds and --workers must be at least 1, --seed at least 0")
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    rows = [
        {"family": family, "scheduler": name, **cell(family, name, seeds, arguments.workers)}
        for family in arguments.families
        for name in SCHEDULERS
    ]
    if arguments.json:
        print(json.dumps({"workers": arguments.workers, "seeds": list(seeds), "rows": rows}))
        return
    print(f"{N} candidates, budgets {BUDGETS}, {len(seeds)} seeds, {arguments.workers} workers")
    print("regret in bits/byte; steps and time in full trainings")
    print(f"{'family':9}{'scheduler':18}{'median':>8}{'mean':>8}{'+-':>7}{'worst':>8}", end="")
    print(f"{'best found':>12}{'1st fails':>11}{'steps':>8}{'time':>8}")
    for row in rows:
        print(f"{row['family']:9}{row['scheduler']:18}{row['median_regret']:8.3f}", end="")
        print(f"{row['mean_regret']:8.3f}{row['standard_error']:7.3f}", end="")
        print(f"{row['worst_regret']:8.3f}{row['best_found']:12.0%}{row['first_fails']:11}", end="")
        print(f"{row['steps'] / FULL:8.2f}{row['time'] / FULL:8.2f}")


def cell(family: str, name: str, seeds: range, n_workers: int) -> dict[str, Any]:
    """Run one scheduler on one family with every seed."""
    studies = [study(family, SCHEDULERS[name], seed, n_workers) for seed in seeds]
    regrets = [study["regret"] for study in studies]
    spread = statistics.stdev(regrets) if len(regrets) > 1 else math.nan
    return {
        "median_regret": statistics.median(regrets),
        "mean_regret": statistics.fmean(regrets),
        "standard_error": spread / math.sqrt(len(regrets)),
        "worst_regret": max(regrets),
        "best_found": sum(regret == 0 for regret in regrets) / len(regrets),
        "first_fails": sum(study["failures"] > 0 for study in studies),
        "steps": statistics.fmean(study["steps"] for study in studies),
        "time": statistics.fmean(study["time"] for study in studies),
        "studies": studies,
    }


def study(family: str, scheduler: Scheduler, seed: int, n_workers: int) -> dict[str, float]:
    """Run one study and the training in full at its end."""
    space = SimulatedCurves(N, seed, FULL, **FAMILIES[family])
    space.check()
    schedule = Schedule(scheduler, AskTell(Grid(N), space))
    trainings = SimulatedTrainings(space.curve)
    trained: dict[int, int] = {}

    def seconds(job: Instalment) -> float:
        """One per step, times a speed of the candidate's own between 1/2 and 2."""
        speed = 0.5 * 4 ** Xorshift64(derive_seed(seed, "speed", job.candidate)).next_f64()
        steps = job.budget - trained.get(job.candidate, 0)
        trained[job.candidate] = job.budget
        return steps * speed

    time = run_workers(schedule, trainings, n_workers, seconds, trainings.points)
    chosen, failures = None, 0
    for candidate in ranking(schedule):
        time += seconds(Instalment(candidate, FULL))
        if trainings.trainings[candidate].step == FULL or trainings(candidate, FULL) is not None:
            chosen = candidate
            break
        failures += 1
    regret = space.regret(chosen)
    return {"regret": regret, "failures": failures, "steps": trainings.steps, "time": time}


def ranking(schedule: Schedule[int]) -> list[int]:
    """Everyone who has not failed, by the best score at any budget, best first."""
    scores = {c: schedule.results.scores(c) for c in range(len(schedule.candidates))}
    sound = [c for c, own in scores.items() if own and FAILED not in own]
    return sorted(sound, key=lambda candidate: -max(scores[candidate]))


if __name__ == "__main__":
    main()
