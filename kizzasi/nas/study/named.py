"""What the names in a `SearchConfig` stand for: spaces, searchers and schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kizzasi.nas.schedulers import (
    ASHA,
    PASHA,
    PDH,
    Hyperband,
    Scheduler,
    StoppingASHA,
)
from kizzasi.nas.schedulers.halving import Halving
from kizzasi.nas.searchers import (
    NSGA2,
    TPE,
    Evolution,
    LocalSearch,
    RegularizedEvolution,
    Searcher,
)
from kizzasi.nas.searchers.random import Samples
from kizzasi.nas.spaces.constraints import Constraints
from kizzasi.nas.study.config import SearchConfig

C = TypeVar("C")


def constraints_of(config: SearchConfig, device: str = "cpu") -> Constraints:
    """The bounds that every searched candidate keeps."""
    low, high = (config.n_params * (1 + sign * config.band) for sign in (-1, 1))
    return Constraints(
        params=(low, high),
        flops_per_token=config.max_flops_per_token,
        state_bytes=config.max_state_bytes,
        latency_ms=config.max_latency_ms,
        peak_memory_bytes=config.max_memory_bytes,
        seq_len=config.bounds_len,
        device=device,
    )


def searcher_of(config: SearchConfig, seed: int) -> Searcher:
    """The searcher of the config, but for "proxy", which trains a pool as it is.

    All begin with the same random candidates, TPE excepted.
    """
    limit, size, mutation = config.n_candidates, config.population, config.mutation
    searchers: dict[str, Callable[[], Searcher]] = {
        "random": lambda: Samples(limit, config.side_by_side, seed),
        "regularized": lambda: RegularizedEvolution(
            size, config.sample, limit, mutation, seed, config.side_by_side
        ),
        "evolution": lambda: Evolution(size, -(-limit // size), config.sample, mutation, seed),
        "local": lambda: LocalSearch(limit, config.side_by_side, "best", mutation, seed),
        "nsga2": lambda: NSGA2(size, -(-limit // size), 0.9, mutation, seed),
        "tpe": lambda: TPE(limit, config.population, seed),
    }
    return searchers[config.searcher]()


def scheduler_of(config: SearchConfig, n_presets: int, group_of: Callable[[int], str]) -> Scheduler:
    """The scheduler of the config.

    Args:
        config: of the search.
        n_presets: candidates that take part beside those of the searcher.
        group_of: the group of a candidate that has been proposed.
    """
    n, rungs, eta = config.n_candidates + n_presets, config.rungs, config.eta
    schedulers: dict[str, Callable[[], Scheduler]] = {
        "halving": lambda: Halving(rungs, config.keep, group_of),
        "hyperband": lambda: Hyperband(rungs[0], rungs[-1], eta, n),
        "asha": lambda: ASHA(n, rungs[0], rungs[-1], eta),
        "stopping": lambda: StoppingASHA(n, rungs[0], rungs[-1], eta),
        "pasha": lambda: PASHA(n, rungs[0], rungs[-1], eta),
        "pdh": lambda: PDH(n, rungs, -(-config.population // 3), config.population),
    }
    return schedulers[config.scheduler]()
