"""Judge searchers, schedulers and proxies on a table of trained models, without training anything.

searches   every searcher under every scheduler, many studies each: what they spend, as a share of
           what it costs to train the whole table, and how far the model they choose by its valid
           score is from the best on test data
proxies    how facts and proxies rank the models, beside their test scores: Kendall's tau-b
fronts     two objectives, the test score and a cost: which share of the box from the best to the
           worst of both (a tenth beyond; costs by their logarithm) the front of all models
           dominates, that of single families, and what NSGA-II and random draws find in many
           studies, led by one seed's valid score

examples:
  python scripts/bench_tables.py searches --studies 200
  python scripts/bench_tables.py proxies --json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.results.hypervolume import BEYOND, Point, hypervolume
from kizzasi.nas.results.rank_agreement import kendall_tau_b
from kizzasi.nas.schedulers import ASHA, Halving, Schedule, Scheduler, run
from kizzasi.nas.searchers import (
    NSGA2,
    Flowing,
    LocalSearch,
    Random,
    RegularizedEvolution,
    Searcher,
    Streaming,
    one_by_one,
    pareto_front,
)
from kizzasi.nas.searchers import run as run_searcher
from kizzasi.nas.spaces.model_space import name_of
from kizzasi.nas.tables import Row, TrainedTable, hybrid216

TOP = 0.01  # share of the table that counts as found


def searchers(n: int, seed: int) -> dict[str, Streaming]:
    """By name; each proposes at most n candidates."""
    return {
        "random": Random(n, seed, distinct=True),
        "regularized": RegularizedEvolution(10, 4, n, 0.34, seed),
        "local": LocalSearch(n, 4, "first", 0.34, seed),
    }


def schedulers(n: int, table: TrainedTable) -> dict[str, Scheduler]:
    """By name, for n candidates."""
    first, last = table.rungs[0], table.rungs[-1]
    return {
        "in full": Halving((last,), 2, n),
        "halving": Halving(table.rungs, 3, n),
        "ASHA": ASHA(n, first, last),
    }


def study(table: TrainedTable, searcher: Streaming, scheduler: Scheduler, seed: int) -> list[float]:
    """Share of the whole cost, regret and rank of one study."""
    schedule = Schedule(scheduler, Flowing(searcher.stream(table.space)))
    best: dict[str, tuple[int, float]] = {}  # by digest: the deepest rung and the score there

    def evaluate(candidate: Any, budget: int) -> float | None:
        found = table(Job(candidate.spec, budget, seed), lambda _: None)
        if found.score is None:
            return None
        best[candidate.spec.digest] = (budget, -found.score)
        return -found.score

    run(schedule, evaluate)
    specs = {row.spec.digest: row.spec for row in table.rows}
    chosen = specs[max(best, key=best.__getitem__)]
    spent = sum(budget for budget, _ in best.values())
    whole = len(table.rows) * table.rungs[-1]
    return [spent / whole, table.regret(chosen), table.rank(chosen)]


def judged(table: TrainedTable, n_studies: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for every searcher, scheduler and number of candidates."""
    rows = []
    top = max(1, round(TOP * len(table.rows)))
    for n in sizes:
        for name, scheduler in schedulers(n, table).items():
            for who in searchers(n, 0):
                found = [
                    study(table, searchers(n, seed)[who], scheduler, seed)
                    for seed in range(n_studies)
                ]
                spent, regrets, ranks = zip(*found, strict=True)
                rows.append(
                    {
                        "searcher": who,
                        "scheduler": name,
                        "candidates": n,
                        "cost": statistics.fmean(spent),
                        "regret": statistics.median(regrets),
                        "mean_regret": statistics.fmean(regrets),
                        "rank": statistics.median(ranks),
                        "top": statistics.fmean(rank <= top for rank in ranks),
                    }
                )
    return rows


def agreements(table: TrainedTable) -> dict[str, float | None]:
    """Kendall's tau-b of every fact, and of earlier scores, with minus the test score."""
    worth = [-row.mean() for row in table.rows]
    seeds = sorted(set.intersection(*(set(row.valid) for row in table.rows)))
    found: dict[str, float | None] = {}
    for i, rung in enumerate(table.rungs):
        early = [-statistics.fmean(row.valid[s][i] for s in seeds) for row in table.rows]
        found[f"valid at {rung:,}"] = kendall_tau_b(early, worth)
    for name in table.rows[0].facts:
        values = [value for row in table.rows if (value := row.facts[name]) is not None]
        if len(values) == len(worth):
            found[name] = kendall_tau_b(values, worth)
    return found


COSTS = ("state_bytes", "flops", "ms")  # those that the table has


def fronts(table: TrainedTable, n_studies: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """For every cost: the shares, and the models on the front."""
    return [
        front(table, cost, n_studies, sizes)
        for cost in COSTS
        if all(row.facts.get(cost) is not None for row in table.rows)
    ]


def front(table: TrainedTable, cost: str, n_studies: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """One cost's row."""

    def points(rows: Iterable[Row], score: Callable[[Row], float]) -> list[Point]:
        return [(math.log(row.facts[cost] or 1), score(row)) for row in rows]

    every = points(table.rows, Row.mean)
    low, high = ([f(axis) for axis in zip(*every, strict=True)] for f in (min, max))

    def share(rows: Iterable[Row]) -> float:
        scaled = [
            tuple((x - a) / (b - a) for x, a, b in zip(point, low, high, strict=True))
            for point in points(rows, Row.mean)
        ]
        return hypervolume(scaled, (BEYOND, BEYOND)) / BEYOND**2

    def found(searcher: Searcher, seed: int) -> float:
        """Led by one seed's valid score, judged by the test score of all."""
        seen: list[Row] = []

        def told(row: Row) -> Point:
            place = sorted(row.valid)[seed % len(row.valid)]
            return points([row], lambda row: row.valid[place][-1])[0]

        def evaluate(candidate: Any) -> Point:
            seen.append(table.row(candidate.spec))
            return told(seen[-1])

        run_searcher(searcher, table.space, one_by_one(evaluate))
        return share(seen[i] for i in pareto_front([told(row) for row in seen]))

    single = [row for row in table.rows if len(set(row.spec.blocks)) == 1]
    best = [table.rows[i] for i in pareto_front(every)]
    searched = {
        n: {
            name: statistics.fmean(found(make(n, seed), seed) for seed in range(n_studies))
            for name, make in FRONT_SEARCHERS.items()
        }
        for n in sizes
    }
    return {
        "cost": cost,
        "all": share(table.rows),
        "single families": share(single),
        "searched": searched,
        "front": [
            {"model": name_of(row.spec), cost: row.facts[cost], "score": row.mean()}
            for row in sorted(best, key=Row.mean)
        ],
    }


FRONT_SEARCHERS: dict[str, Callable[[int, int], Searcher]] = {
    "random": lambda n, seed: Random(n, seed, distinct=True),
    "NSGA-II": lambda n, seed: NSGA2(8, n // 8 - 1, 0.7, 0.34, seed),
}


def print_fronts(found: list[dict[str, Any]]) -> None:
    print("| cost | of all | of single families | candidates | random | NSGA-II |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for one in found:
        for n, shares in one["searched"].items():
            known = f"{one['all']:.3f} | {one['single families']:.3f} | {n}"
            figures = " | ".join(f"{shares[name]:.3f}" for name in FRONT_SEARCHERS)
            print(f"| {one['cost']} | {known} | {figures} |")
    for one in found:
        cost = one["cost"]
        print(f"\n| on the front of {cost} | {cost} | test score |\n| --- | ---: | ---: |")
        for row in one["front"]:
            print(f"| {row['model']} | {row[cost]:,.6g} | {row['score']:.4f} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("searches", "proxies", "fronts"))
    parser.add_argument("--studies", type=int, default=100, help="of each row of searches (100)")
    parser.add_argument("--candidates", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    table = hybrid216()
    if args.part == "proxies":
        found = agreements(table)
        if args.json:
            print(json.dumps(found))
            return
        print("| beside the test score | Kendall's tau-b |\n| --- | ---: |")
        for name, tau in found.items():
            print(f"| {name} | {'-' if tau is None else f'{tau:.2f}'} |")
        return
    if args.part == "fronts":
        found = fronts(table, args.studies, tuple(args.candidates))
        print(json.dumps(found)) if args.json else print_fronts(found)
        return
    rows = judged(table, args.studies, tuple(args.candidates))
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{args.studies} studies each; cost as a share of training all {len(table.rows)} models")
    print("| searcher | scheduler | candidates | cost | regret | mean | rank | in the top 1 % |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        figures = f"{row['candidates']} | {row['cost']:.1%} | {row['regret']:.4f}"
        more = f"{row['mean_regret']:.4f} | {row['rank']:g} | {row['top']:.0%}"
        print(f"| {row['searcher']} | {row['scheduler']} | {figures} | {more} |")


if __name__ == "__main__":
    main()
