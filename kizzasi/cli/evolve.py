"""Breed pipelines from seeds: mutation, crossover by modules, immigrants, ASHA for each generation.

example:
  kizzasi evolve examples --generations 8 --population 8 --top-k 4 --out runs/evolution
  kizzasi evolve my.yaml runs/first/best --macro-prob 0.4 --immigrants 2

Every child is written as gen_N/variant_K.yaml, and to lineage.jsonl, before it is trained. The best
is measured against the best seed, at no more parameters than the largest seed has. Killed at any
moment, a run goes on with --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kizzasi.cli.over_pipelines import (
    add_common,
    evaluator_of,
    executor_of,
    finished,
    space_of,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, "runs/evolution")
    for flag, default, text in (
        ("--generations", 4, "generations after the seeds"),
        ("--population", 8, "children of a generation, and members that are kept"),
        ("--top-k", 4, "members that breed"),
        ("--immigrants", 1, "new samples in each generation"),
        ("--novelty-draws", 1, "children of which the most novel is taken"),
        ("--asha-min", 20, "first rung, in steps"),
        ("--asha-max", 60, "last rung, in steps"),
        ("--reduction", 3, "one in so many goes on"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} ({default})")
    for flag, default, text in (
        ("--crossover-prob", 0.5, "chance that a child has two parents"),
        ("--macro-prob", 0.2, "chance that it is changed a few times at once"),
        ("--mutation-prob", 0.3, "chance per layer of each change"),
    ):
        parser.add_argument(flag, type=float, default=default, help=f"{text} ({default})")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas import ASHA, Constraints, Finals, Search
    from kizzasi.nas.pipelines import PipelineEvolution, Variant, to_pipeline
    from kizzasi.train.seeds import derive_seed

    per_step = args.seq_len * args.batch_size
    evaluator = evaluator_of(args, args.asha_max)
    space, folder = space_of(args, evaluator), Path(args.out)
    seeds = tuple(map(Variant, space.seeds))
    searcher = PipelineEvolution(
        args.population,
        args.generations,
        args.top_k,
        args.crossover_prob,
        args.macro_prob,
        args.immigrants,
        args.novelty_draws,
        args.mutation_prob,
        derive_seed(args.seed, "candidates"),
        folder,
        seeds,
    )
    n = (1 + args.generations) * args.population + len(seeds)
    scheduler = ASHA(n, args.asha_min * per_step, args.asha_max * per_step, args.reduction)
    found = Search(
        space,
        evaluator,
        searcher=searcher,
        scheduler=scheduler,
        folder=folder,
        constraints=Constraints(params=(0, max(s.cost(1).params for s in space.seeds))),
        baselines=space.seeds,
        finals=Finals(1, None, args.final_seeds),
        executor=executor_of(args),
        seed=args.seed,
        side_by_side=args.population,
    ).run(resume=args.resume)
    (folder / "best.yaml").write_text(to_pipeline(found.best.spec).to_yaml(), "utf-8")
    return finished(found, args, len(scheduler.budgets(0)), space.seeds)
