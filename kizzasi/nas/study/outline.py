"""What a search would do at most, and how long that takes: before it begins."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import Any

from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.study.candidates import baseline_entries
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.named import plan_of
from kizzasi.nas.study.plan import Plan
from kizzasi.train.open import open_task
from kizzasi.train.task import Task

TIMED_STEPS = 4


AS_THEY_COME = ("asha", "stopping", "pasha")  # a candidate may climb that beats those before it


def tokens_at_most(config: SearchConfig, n_baselines: int) -> int:
    """What the bar counts to: an upper bound, since failed trials stop early, and where results
    decide as they come, each candidate may be better than those before it and train on."""
    n, total, before = config.n_candidates + n_baselines, 0, 0
    if config.searcher == "proxy":
        n = n_baselines + config.n_best + config.n_random + config.n_outside
    for tokens in config.budgets:
        total += n * (tokens - before)
        before = tokens
        if config.scheduler not in AS_THEY_COME:
            n = max(2, round(config.keep * n)) + 1
    total = config.search_tokens or total
    n_tried = math.prod(map(len, config.sweep.values()))
    sweeps = (n_baselines + config.n_sweep) * (n_tried - 1) * config.budgets[0]
    seeds = config.final_seeds + config.slope_seeds
    n_finalists = min(config.n_finalists, config.n_candidates)
    return total + sweeps + (1 + n_finalists) * seeds * config.final_tokens


def final_tokens_at_most(plan: Plan) -> int:
    """Of these, what the final trainings are."""
    finals, budget = plan.finals, plan.finals.budget or plan.budgets[-1]
    return (1 + finals.n) * (finals.seeds + finals.slope_seeds) * budget


def outline(
    config: SearchConfig,
    space: Any = None,
    *,
    task: Task | None = None,
    device: str = "cpu",
    workers: int | None = None,
) -> dict[str, Any]:
    """What `named_search` would do at most, and how long that would take; nothing is written.

    Args:
        config, space, task, device, workers: as there.

    Returns:
        trials, candidates, baselines, tokens, workers, params (of the model that was timed),
        tokens_per_second (of all workers) and seconds.

    Raises:
        DataError, SpecError: as there.
    """
    config.check()
    task = task or open_task(config.data, test_fraction=config.test_fraction, test=config.test)
    plan = plan_of(config, task, space)
    plan.check()
    plan.check_steps()
    rules = replace(plan.constraints, device=device)
    plan.check_budget(len(baseline_entries(plan.baselines, rules)))
    n, presets = config.n_candidates, len(plan.baselines)
    if config.searcher == "proxy":
        n = config.n_best + config.n_random + config.n_outside
    tokens = tokens_at_most(config, presets)
    n_tried = math.prod(map(len, config.sweep.values()))
    sweeps = (presets + config.n_sweep) * (n_tried - 1)
    n_finalists = min(config.n_finalists, config.n_candidates)
    finals = (1 + n_finalists) * (config.final_seeds + config.slope_seeds)
    spec = next(iter(plan.baselines.values()))
    pace = _pace(plan.micro_training, spec, device)
    side_by_side = workers or (os.cpu_count() or 1 if device == "cpu" else 1)
    return {
        "trials": (n + presets) * len(config.budgets) + sweeps + finals,
        "candidates": n,
        "baselines": presets,
        "tokens": tokens,
        "workers": side_by_side,
        "params": spec.cost(1).params,
        "tokens_per_second": pace * side_by_side,
        "seconds": tokens / (pace * side_by_side),
    }


def _pace(evaluator: MicroTrain, spec: ModelSpec, device: str) -> float:
    """Tokens a second of one training, from a few steps."""
    training = evaluator.training(Job(spec, 1, 0, device=device))
    step = training.recipe.tokens_per_step
    training.run(step)
    start = time.perf_counter()
    training.run(step * (1 + TIMED_STEPS))
    return step * TIMED_STEPS / (time.perf_counter() - start)
