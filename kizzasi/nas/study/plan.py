"""`Plan`: a search as objects, everything that decides its result."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Evaluator
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.schedulers import Scheduler
from kizzasi.nas.searchers import Searcher
from kizzasi.nas.spaces.constraints import Constraints
from kizzasi.nas.spaces.joint import DROPOUT, Joint
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.spaces.stem import Stem
from kizzasi.nas.study.candidates import ProxyPool
from kizzasi.nas.study.config import ANALYTIC
from kizzasi.strict import unknown_name
from kizzasi.train.task import Metric

MOST = 100_000  # candidates that a scheduler is asked about
# What of a recipe may be a gene: neither length nor horizon, at which scores are compared.
GENES = ("lr", "matrix_lr", "weight_decay", "batch_size", "warmup", "min_lr", "clip")


@dataclass(frozen=True)
class Finals:
    """The last trainings, from scratch: the best searched candidates beside the best baseline.

    Args:
        n: searched candidates that take part.
        budget: of each training; None takes that of the last rung.
        seeds: trainings of each, with seeds that no rung has seen.
        slope_seeds: as many of them also train every finalist at about half of the parameters.
        size_matched: only those with hardly more parameters than the best baseline may take part,
            as far as there are any.
        test: read the test split for the result, where the evaluator has one.
    """

    n: int = 1
    budget: int | None = None
    seeds: int = 3
    slope_seeds: int = 0
    size_matched: bool = True
    test: bool = True


@dataclass(frozen=True)
class Plan:
    """A search, apart from where it runs.

    Args:
        space: of candidates.
        evaluator: trains and scores them.
        metric: of its scores.
        searcher: proposes candidates.
        scheduler: says who trains on, and to which budgets.
        stem: of every model; None leaves that to the candidates.
        constraints: that candidates keep.
        baselines: models that take part beside them and are to be beaten, by name.
        settings: by name, the values among which a short sweep chooses for each family.
        n_sweep: candidates of a family that share a sweep.
        finals: the last trainings.
        seed: of everything random.
        side_by_side: None: what a free worker does is decided when it is free; a number: so many
            trainings are decided on at once, and all end before the next are.
        at_once: with such a number, everything that can run is decided on at once: where no score
            leads the search.
        budget: no training on the rungs starts beyond this sum; None for no limit.
        first: candidates that the searcher begins with.
        proxies: zero-cost proxies of every trained candidate; recorded, never decisive.
        screens: what chooses each proposal among `screen_width` draws.
        screen_width, screen_tokens: see there.
        described: written into the journal; a resumed run must be the same.
    """

    space: Space[Any]
    evaluator: Evaluator
    metric: Metric
    searcher: Searcher | ProxyPool
    scheduler: Scheduler
    stem: Stem | None = None
    constraints: Constraints = field(default_factory=Constraints)
    baselines: Mapping[str, ModelSpec] = field(default_factory=dict)
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    n_sweep: int = 1
    finals: Finals = field(default_factory=Finals)
    seed: int = 0
    side_by_side: int | None = None
    at_once: bool = False
    budget: int | None = None
    first: Sequence[Any] = ()
    proxies: tuple[str, ...] = ()
    screens: tuple[str, ...] = ()
    screen_width: int = 4
    screen_tokens: int = 8192
    described: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        self.constraints.check()
        self.scheduler.check()
        if not self.budgets:
            raise SpecError("scheduler: it wants no candidate; give it at least one")
        if (self.proxies or self.screens) and not isinstance(self.evaluator, MicroTrain):
            raise SpecError(
                "proxies, screens: they look at the data of a MicroTrain; leave them out with a "
                "training function of your own"
            )
        for name, values in self.settings.items():
            if not values:
                raise SpecError(f"settings: {name!r} has no value to choose from; give one")
        if isinstance(self.space, Joint):
            self._check_genes(self.space)

    def _check_genes(self, space: Joint[Any]) -> None:
        if isinstance(self.searcher, ProxyPool) or ANALYTIC in self.screens:
            raise SpecError("genes: the analytic proxy ranks models alone; choose another searcher")
        alone = [name for name in self.settings if name not in space.genes]
        if alone:
            raise SpecError(
                f"settings: {alone[0]!r} would be chosen for baselines alone; make it a gene, too"
            )
        if not isinstance(self.evaluator, MicroTrain):
            return
        for name, values in space.genes.items():
            if name != DROPOUT and name not in GENES:
                raise SpecError(f"genes: {name!r} {unknown_name(name, (*GENES, DROPOUT))}")
            for value in values if name != DROPOUT else ():
                replace(self.evaluator.recipe, **{name: value}).check()

    def check_steps(self) -> None:
        """Raises SpecError if a training is to be shorter than a step. For new searches: earlier
        ones have done such a step, and go on."""
        if not isinstance(self.evaluator, MicroTrain):
            return
        recipe, least = self.evaluator.recipe, min(self.budgets[0], self.final_budget)
        if least < recipe.tokens_per_step:
            raise SpecError(
                f"batch_size: a step of {recipe.batch_size:,} windows of {recipe.seq_len:,} takes "
                f"{recipe.tokens_per_step:,} tokens, and a training of {least:,} was asked for; "
                "lower batch_size or seq_len, or raise the rungs and the budget of the finals"
            )

    def check_budget(self, n_baselines: int) -> None:
        """Raises SpecError if the baselines that keep the rules alone spend the budget."""
        first = sum(sum(self.scheduler.budgets(i)[:1]) for i in range(n_baselines))
        if self.budget is not None and self.budget <= first:
            raise SpecError(
                f"search_tokens: {self.budget:,} leave nothing to candidates, since {n_baselines} "
                f"baselines take {first:,} first; give several times as many"
            )

    @property
    def budgets(self) -> tuple[int, ...]:
        """All budgets that the scheduler knows, rising: the rungs."""
        found: set[int] = set()
        for candidate in range(MOST):
            own = self.scheduler.budgets(candidate)
            if not own or (candidate > 1000 and found.issuperset(own)):
                break
            found.update(own)
        return tuple(sorted(found))

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Every combination of settings."""
        names, values = list(self.settings), self.settings.values()
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]

    @property
    def final_budget(self) -> int:
        return self.finals.budget or self.budgets[-1]

    @property
    def micro_training(self) -> MicroTrain:
        """The evaluator, where only a MicroTrain will do."""
        assert isinstance(self.evaluator, MicroTrain), "checked"
        return self.evaluator
