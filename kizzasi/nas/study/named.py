"""What the names in a `SearchConfig` stand for: spaces, searchers and schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kizzasi.models import ModelSpec, Tokens, presets
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.schedulers import (
    ASHA,
    PASHA,
    PDH,
    Extrapolated,
    Halving,
    Hyperband,
    Scheduler,
    StoppingASHA,
)
from kizzasi.nas.searchers import (
    NSGA2,
    TPE,
    Evolution,
    Grid,
    LocalSearch,
    Random,
    RegularizedEvolution,
    Searcher,
)
from kizzasi.nas.spaces.constraints import Constraints
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.spaces.joint import Joint
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.ready_made import definition, read_space
from kizzasi.nas.spaces.stem import Stem
from kizzasi.nas.study.candidates import ProxyPool
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.plan import Finals, Plan
from kizzasi.train.recipe import Recipe
from kizzasi.train.seeds import derive_seed
from kizzasi.train.task import Task


def plan_of(config: SearchConfig, task: Task, space: Any = None) -> Plan:
    """The search that a config describes.

    Args:
        config: names and numbers.
        task: its data.
        space: candidates, in place of the config's space.

    Raises:
        SpecError: the config or the space breaks a rule.
    """
    config.check()
    space = space or read_space(config.space, task.stem, config.n_params)
    if isinstance(space, ArchSearchSpace):
        space.check()
    recipe = Recipe(
        horizon=config.budgets[-1],
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        score_windows=config.score_windows,
        optimizer=config.optimizer,
        precision=config.precision,
        compile=config.compile,
        accumulate=config.accumulate,
        fused=config.fused,
    )
    baselines = usual(config, space, task.stem)
    joint = Joint(space, config.genes) if config.genes else space
    seed = derive_seed(config.seed, "candidates")
    finals = Finals(
        config.n_finalists,
        config.final_tokens,
        config.final_seeds,
        config.slope_seeds,
    )
    return Plan(
        space=joint,
        evaluator=MicroTrain(task, recipe),
        metric=task.metric,
        searcher=searcher_of(config, seed),
        scheduler=scheduler_of(config, len(baselines)),
        stem=task.stem,
        constraints=constraints_of(config),
        baselines=baselines,
        settings={k: v for k, v in config.sweep.items() if not config.genes or k in config.genes},
        n_sweep=config.n_sweep if isinstance(space, ModelSpace) else 1,
        finals=finals,
        seed=config.seed,
        side_by_side=config.side_by_side,
        at_once=config.scheduler == "halving" and config.searcher in ("proxy", "random"),
        budget=config.search_tokens,
        first=_known(joint, baselines.values()),
        proxies=config.proxies,
        screens=config.screens,
        screen_width=config.screen_width,
        screen_tokens=config.screen_tokens,
        described={**config.to_dict(), "template": definition(space)},
    )


def usual(config: SearchConfig, space: Any, stem: Stem) -> dict[str, ModelSpec]:
    """The usual proportions of the families at the same budget, by name."""
    families = presets.SMALL
    if isinstance(space, ArchSearchSpace):
        families = [t for t in space.model_types if t in presets.SMALL]
    return {f"{family} preset": at_size(family, config.n_params, stem) for family in families}


def at_size(family: str, n_params: int, stem: Stem) -> ModelSpec:
    """A family's preset with the stem of the task."""
    if isinstance(stem, Tokens):
        return presets.at_size(family, n_params, vocab_size=stem.vocab_size)
    spec = presets.at_size(family, n_params, vocab_size=1)
    return spec.replace(stem=stem, tie_head=False)


def _known(space: Any, specs: Iterable[ModelSpec]) -> list[Any]:
    """The presets that lie in the space: searchers begin with them."""
    if not isinstance(space, (ModelSpace, Joint)):
        return []
    found = [space.encode(spec) for spec in specs]
    return [candidate for candidate in found if candidate]


def constraints_of(config: SearchConfig) -> Constraints:
    """The bounds that every searched candidate keeps."""
    low, high = (config.n_params * (1 + sign * config.band) for sign in (-1, 1))
    return Constraints(
        params=(low, high),
        flops_per_token=config.max_flops_per_token,
        state_bytes=config.max_state_bytes,
        latency_ms=config.max_latency_ms,
        peak_memory_bytes=config.max_memory_bytes,
        seq_len=config.bounds_len,
    )


def searcher_of(config: SearchConfig, seed: int) -> Searcher | ProxyPool:
    """The searcher of the config. All begin with the same random candidates, TPE excepted."""
    limit, size, mutation = config.n_candidates, config.population, config.mutation
    at_once = config.side_by_side or 1
    searchers: dict[str, Callable[[], Searcher | ProxyPool]] = {
        "proxy": lambda: ProxyPool(
            config.pool, config.n_best, config.n_random, config.n_outside, seed
        ),
        "grid": lambda: Grid(limit),
        "random": lambda: Random(limit, seed, distinct=True, batch_size=at_once),
        "regularized": lambda: RegularizedEvolution(
            size, config.sample, limit, mutation, seed, at_once
        ),
        "evolution": lambda: Evolution(size, -(-limit // size), config.sample, mutation, seed),
        "local": lambda: LocalSearch(limit, config.side_by_side or 4, "best", mutation, seed),
        "nsga2": lambda: NSGA2(size, -(-limit // size), 0.9, mutation, seed),
        "tpe": lambda: TPE(limit, config.population, seed),
    }
    return searchers[config.searcher]()


def scheduler_of(config: SearchConfig, n_presets: int) -> Scheduler:
    """The scheduler of the config.

    Args:
        config: of the search.
        n_presets: candidates that take part beside those of the searcher.
    """
    n, rungs, eta = config.n_candidates + n_presets, config.rungs, config.eta
    schedulers: dict[str, Callable[[], Scheduler]] = {
        "halving": lambda: Halving(rungs, config.keep),
        "hyperband": lambda: Hyperband(rungs[0], rungs[-1], eta, n),
        "asha": lambda: ASHA(n, rungs[0], rungs[-1], eta),
        "stopping": lambda: StoppingASHA(n, rungs[0], rungs[-1], eta),
        "pasha": lambda: PASHA(n, rungs[0], rungs[-1], eta),
        "pdh": lambda: PDH(n, rungs, -(-config.population // 3), config.population),
    }
    scheduler = schedulers[config.scheduler]()
    return Extrapolated(scheduler) if config.extrapolate else scheduler
