"""Compare schedulers on simulated learning curves whose best candidate is known.

Regret is how far the chosen candidate's true loss after a full training is from the best one's, in
bits per byte; choosing one that fails on the way there costs all there was to learn. Steps are what
was spent, in full trainings. Nothing is trained: half a minute on a laptop.

    python scripts/bench_schedulers.py
    python scripts/bench_schedulers.py --seeds 50 --workers 4 --families late noisy --json
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from kizzasi.nas.rng import Xorshift64
from kizzasi.nas.schedulers import (
    ASHA,
    PASHA,
    PDH,
    Hyperband,
    Job,
    Schedule,
    Scheduler,
    StoppingASHA,
    SuccessiveHalving,
)
from kizzasi.nas.searchers import Grid, Search
from kizzasi.nas.simulate import SimulatedCurves, SimulatedTrainings, run_workers
from kizzasi.nas.storage import derive_seed

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
    "all in full": SuccessiveHalving(N, FULL, FULL),
    "halving": SuccessiveHalving(N, SMALLEST, FULL),
    "Hyperband": Hyperband(SMALLEST, FULL),
    "ASHA": ASHA(N, SMALLEST, FULL),
    "ASHA, stopping": StoppingASHA(N, SMALLEST, FULL),
    "PASHA": PASHA(N, SMALLEST, FULL, epsilon=2 * NOISE),
    "PDH": PDH(N, BUDGETS, generation=24, population_size=48),
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
    print(f"{'family':9}{'scheduler':16}{'median':>8}{'mean':>8}{'worst':>8}", end="")
    print(f"{'best found':>12}{'steps':>8}{'time':>8}")
    for row in rows:
        print(f"{row['family']:9}{row['scheduler']:16}{row['median_regret']:8.3f}", end="")
        print(f"{row['mean_regret']:8.3f}{row['worst_regret']:8.3f}", end="")
        print(f"{row['best_found']:12.0%}{row['steps'] / FULL:8.2f}{row['time'] / FULL:8.2f}")


def cell(family: str, name: str, seeds: range, n_workers: int) -> dict[str, Any]:
    """Run one scheduler on one family with every seed."""
    studies = [study(family, SCHEDULERS[name], seed, n_workers) for seed in seeds]
    regrets = [regret for regret, _, _ in studies]
    return {
        "median_regret": statistics.median(regrets),
        "mean_regret": statistics.fmean(regrets),
        "worst_regret": max(regrets),
        "best_found": sum(regret == 0 for regret in regrets) / len(regrets),
        "steps": statistics.fmean(steps for _, steps, _ in studies),
        "time": statistics.fmean(time for _, _, time in studies),
        "studies": [{"regret": regret, "steps": steps, "time": t} for regret, steps, t in studies],
    }


def study(family: str, scheduler: Scheduler, seed: int, n_workers: int) -> tuple[float, int, float]:
    """Return the regret, the steps trained and the time at the end of one study."""
    space = SimulatedCurves(N, seed, FULL, **FAMILIES[family])
    space.check()
    schedule = Schedule(scheduler, Search(Grid(N), space))
    trainings = SimulatedTrainings(space.curve)
    trained: dict[int, int] = {}

    def seconds(job: Job) -> float:
        """One per step, times a speed of the candidate's own between 1/2 and 2."""
        speed = 0.5 * 4 ** Xorshift64(derive_seed(seed, "speed", job.candidate)).next_f64()
        steps = job.budget - trained.get(job.candidate, 0)
        trained[job.candidate] = job.budget
        return steps * speed

    time = run_workers(schedule, trainings, n_workers, seconds)
    best = schedule.best()
    return space.regret(best[0].candidate if best else None), trainings.steps, time


if __name__ == "__main__":
    main()
