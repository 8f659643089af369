"""Judge searchers, schedulers and proxies on a table of trained models, without training anything.

searches   every searcher under every scheduler, many studies each: what they spend, as a share of
           what it costs to train the whole table, and how far the model they choose by its valid
           score is from the best on test data
proxies    how facts and proxies rank the models, beside their test scores: Kendall's tau-b

examples:
  python scripts/bench_tables.py searches --studies 200
  python scripts/bench_tables.py proxies --json
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.results.rank_agreement import kendall_tau_b
from kizzasi.nas.schedulers import ASHA, Halving, Schedule, Scheduler, run
from kizzasi.nas.searchers import Flowing, LocalSearch, Random, RegularizedEvolution, Streaming
from kizzasi.nas.tables import TrainedTable, hybrid216

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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("searches", "proxies"))
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
