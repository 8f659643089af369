"""Train many pipelines a little and few of them long: ASHA for breadth, then hurdles for depth.

example:
  kizzasi sweep examples --asha-min 20 --asha-max 60 --pdh-stages 120 240 --out runs/sweep
  kizzasi sweep their/*.yaml --repair --scale 0.1
  kizzasi sweep examples --asha-min 120 --asha-max 120 --pdh-stages --markdown   # a table

Budgets are optimiser steps. Killed at any moment, a sweep goes on with --resume.
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
    add_common(parser, "runs/sweep")
    parser.add_argument("--asha-min", type=int, default=20, help="first rung, in steps (20)")
    parser.add_argument("--asha-max", type=int, default=60, help="last rung, in steps (60)")
    parser.add_argument("--reduction", type=int, default=3, help="one in so many goes on (3)")
    parser.add_argument(
        "--pdh-stages",
        type=int,
        nargs="*",
        default=[120, 240],
        metavar="STEPS",
        help="stages of the depth, in steps (120 240)",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas import Finals, Grid, Search
    from kizzasi.nas.schedulers import Sweep

    per_step = args.seq_len * args.batch_size
    stages = tuple(steps * per_step for steps in args.pdh_stages)
    evaluator = evaluator_of(args, max([args.asha_max, *args.pdh_stages]))
    space = space_of(args, evaluator)
    n = len(space.seeds)
    low, high = args.asha_min * per_step, args.asha_max * per_step
    scheduler = Sweep(n, low, high, args.reduction, stages)
    found = Search(
        space,
        evaluator,
        searcher=Grid(n),
        scheduler=scheduler,
        folder=Path(args.out),
        finals=Finals(1, None, args.final_seeds),
        executor=executor_of(args),
        seed=args.seed,
        side_by_side=n,
    ).run(resume=args.resume)
    return finished(found, args, len(scheduler.breadth), space.seeds)
