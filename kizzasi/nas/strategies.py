"""What the names in a `SearchConfig` stand for: spaces, searchers and schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kizzasi.errors import SpecError
from kizzasi.models.strict import unknown_name
from kizzasi.nas.arch_search import ArchSearchSpace
from kizzasi.nas.constraints import Constraints
from kizzasi.nas.model_space import ModelSpace
from kizzasi.nas.rng import Xorshift64
from kizzasi.nas.schedulers import (
    ASHA,
    PASHA,
    PDH,
    Hyperband,
    Results,
    Scheduler,
    StoppingASHA,
)
from kizzasi.nas.schedulers.schedule import ranked
from kizzasi.nas.searchers import (
    NSGA2,
    TPE,
    Evolution,
    LocalSearch,
    Proposals,
    RegularizedEvolution,
    Searcher,
)
from kizzasi.nas.searchers.search import fresh
from kizzasi.nas.settings import SearchConfig
from kizzasi.nas.space import Space
from kizzasi.nas.spaces import hybrid, mamba_rwkv, moe, tiny

C = TypeVar("C")

SMALL_SPACE = ArchSearchSpace(
    d_model_options=(48, 64, 80, 96, 112, 128),
    d_state_options=(8, 16, 32),
    n_layers_options=(2, 3, 4, 5, 6),
    model_types=("mamba", "rwkv", "s4", "transformer", "rwkv+transformer", "mamba+transformer"),
    expand_factor_options=(1.0, 1.5, 2.0, 3.0, 4.0),
    dropout_options=(0.0,),
)
SPACES: dict[str, Callable[[], ModelSpace]] = {
    "tiny": tiny,
    "hybrid": hybrid,
    "mamba_rwkv": mamba_rwkv,
    "moe": moe,
}


def read_space(name: str) -> ArchSearchSpace | ModelSpace:
    """The ready-made space of this name, or the one in a YAML or JSON file.

    Raises:
        SpecError: no such name, or what is wrong with the file.
    """
    if name == "families":
        return SMALL_SPACE
    if name in SPACES:
        return SPACES[name]()
    if Path(name).suffix not in (".yaml", ".yml", ".json"):
        known = unknown_name(name, ["families", *SPACES])
        raise SpecError(f"space: {name!r} {known}; or give a .yaml file")
    return ModelSpace.from_file(name)


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


@dataclass(frozen=True)
class Samples:
    """Random search without repeats, in batches, so that it may end at any time.

    Args:
        n_candidates: proposed in all.
        batch_size: drawn at once.
        seed: 0 .. 2^64 - 1.
    """

    n_candidates: int
    batch_size: int
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield batches; the search ends early when 100 draws bring nothing new."""
        rng, known = Xorshift64(self.seed), set[C]()
        while (left := self.n_candidates - len(known)) > 0:
            batch = fresh(partial(space.sample, rng), known, min(self.batch_size, left))
            if not batch:
                return
            yield batch


@dataclass(frozen=True)
class Halving:
    """Synchronous halving with a place for those that the result is compared with.

    A rung passes on the best `keep` of its members, at least 2; the best preset and the best
    searched candidate are always among them, candidates from outside the band never.

    Args:
        rungs: budgets, rising.
        keep: share of a rung's members, 0 .. 1.
        group_of: the group of a candidate.
    """

    rungs: tuple[int, ...]
    keep: float
    group_of: Callable[[int], str]

    def check(self) -> None:
        """The config has been checked."""

    def budgets(self, candidate: int) -> Sequence[int]:
        return self.rungs

    def survivors(self, results: Results) -> Sequence[int]:
        """Return the members of the lowest unfinished rung that are not scored there yet."""
        standing = list(range(results.n_candidates or 0))
        for k in range(len(self.rungs)):
            scores = results.rung(k)
            if missing := [candidate for candidate in standing if candidate not in scores]:
                return missing if k else []
            standing = self._promoted({c: scores[c] for c in standing})
        return []

    def _promoted(self, scores: dict[int, float]) -> list[int]:
        inside = [c for c in ranked(scores) if self.group_of(c) != "outside"]
        kept = set(inside[: max(2, round(self.keep * len(scores)))])
        kept.update([c for c in inside if self.group_of(c) == "preset"][:1])
        kept.update([c for c in inside if self.group_of(c) != "preset"][:1])
        return [c for c in inside if c in kept]


def definition(space: ArchSearchSpace | ModelSpace) -> dict[str, Any]:
    """A space as plain data for the journal."""
    return dict(space.template) if isinstance(space, ModelSpace) else dict(vars(space))
