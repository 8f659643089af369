"""Screens: every proposal is the best of a few draws by a cheaper measure than training.

The cascade from cheap to dear: constraints refuse without building a model, screens choose among
draws by the analytic proxy, a zero-cost proxy, a probe or a short training that begins with the
parent's weights, and micro-training from scratch gives the only score that counts.

A screen compares draws for one place with each other and nothing else. So scores of children that
inherited meet only those of siblings with the same parent, and never one from scratch.

Journal:
    screen    id (of the draw), by, parent (id of the trial that gave the weights, or null), score
              (higher is better, null if it failed), failure; of a child also tokens, inherited
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from kizzasi.models import ModelSpec
from kizzasi.nas.entrants import VOCAB, zero_cost
from kizzasi.nas.executors.job import EXPLOSIONS, USERS_ERRORS
from kizzasi.nas.inherit import train_child
from kizzasi.nas.probes import PROBES
from kizzasi.nas.proxies import Batch
from kizzasi.nas.rng import Xorshift64
from kizzasi.nas.settings import ANALYTIC, INHERIT
from kizzasi.nas.space import Space
from kizzasi.nas.study import Study, Trial

C = TypeVar("C")

Judge = Callable[[Any, Any], "float | None"]  # of a draw and its parent; higher is better


class Screened(Generic[C]):
    """A space whose moves return the best of several draws; itself a space, for any searcher.

    A draw that was returned before comes after those that were not, a draw that cannot be judged
    after those that can; of equals, the first. `build` and `iterate` leave nothing to choose.

    Args:
        space: to draw from.
        judge: says what a draw is worth; None if it cannot.
        width: draws for each place, at least 1.
    """

    def __init__(self, space: Space[C], judge: Judge, width: int) -> None:
        self.space, self.judge, self.width = space, judge, width
        self.given: set[C] = set()

    @property
    def size(self) -> int:
        return self.space.size

    def sample(self, rng: Xorshift64) -> C:
        """The best of several samples."""
        return self._best(lambda: self.space.sample(rng), None)

    def build(self, decide: Callable[[str, int], int]) -> C:
        return self.space.build(decide)

    def mutate(self, candidate: C, rng: Xorshift64, prob: float) -> C:
        """The best of several mutants of one parent."""
        return self._best(lambda: self.space.mutate(candidate, rng, prob), candidate)

    def crossover(self, a: C, b: C, rng: Xorshift64) -> C:
        """The best of several children of two parents; weights are inherited from `a`."""
        return self._best(lambda: self.space.crossover(a, b, rng), a)

    def iterate(self, limit: int | None = None) -> Sequence[C]:
        return self.space.iterate(limit)

    def contains(self, candidate: C) -> bool:
        return self.space.contains(candidate)

    def _best(self, draw: Callable[[], C], parent: C | None) -> C:
        draws = list(dict.fromkeys(draw() for _ in range(self.width)))
        new = [d for d in draws if d not in self.given and d != parent] or draws
        chosen = max(new, key=lambda d: self._worth(d, parent)) if len(new) > 1 else new[0]
        self.given.add(chosen)
        return chosen

    def _worth(self, draw: C, parent: C | None) -> float:
        worth = self.judge(draw, parent)
        return -math.inf if worth is None or math.isnan(worth) else worth


@dataclass(frozen=True)
class Screen:
    """A judge that writes down what it finds, so that a resumed search chooses alike.

    Args:
        by: one of SCREENS.
        study: whose journal and evaluator serve.
        batch: what zero-cost proxies look at.
        last_trial: the last training of a candidate's model, None unless its checkpoint is kept.
        tokens: that a child is trained on from its parent's weights.
        seed: of initialisations.
        device: where probes train.
    """

    by: str
    study: Study
    batch: Callable[[], Batch]
    last_trial: Callable[[ModelSpec], Trial | None]
    tokens: int
    seed: int
    device: str

    def __call__(self, draw: Any, parent: Any) -> float | None:
        if self.by == ANALYTIC:
            return draw.proxy_score()
        spec, trial = draw.to_spec(vocab_size=VOCAB), None
        if self.by == INHERIT:
            if parent is not None:
                trial = self.last_trial(parent.to_spec(vocab_size=VOCAB))
            if trial is None:
                return None
        event = self.study.once(
            "screen",
            lambda: self._measure(spec, trial),
            id=spec.digest[:12],
            by=self.by,
            parent=trial and trial.id,
        )
        return event["score"]

    def _measure(self, spec: ModelSpec, parent: Trial | None) -> dict[str, Any]:
        try:
            if parent is not None:
                return self._child(spec, parent)
            if self.by in PROBES:
                probed = PROBES[self.by](spec, self.seed, self.device)
                return {"score": probed.accuracy, "failure": probed.failure}
        except USERS_ERRORS:
            raise
        except EXPLOSIONS as error:
            return {"score": None, "failure": repr(error)}
        found = zero_cost(spec, (self.by,), self.batch(), self.seed)
        failure = found.get("proxy_failures", {}).get(self.by)
        return {"score": found["proxies"][self.by], "failure": failure}

    def _child(self, spec: ModelSpec, parent: Trial) -> dict[str, Any]:
        """Train it for a while, with its parent's learning rate, from its parent's weights."""
        evaluator = self.study.executor.evaluator
        recipe = replace(evaluator.recipe, lr=parent.lr, horizon=self.tokens)
        evaluator = replace(evaluator, recipe=recipe)
        trained = evaluator.training(parent.entry.spec, parent.seed)
        trained.restore(self.study.checkpoint(parent))
        found = train_child(
            evaluator, spec, trained.model, self.tokens, self.seed, parent_tokens=trained.tokens
        ).to_dict()
        bits, kept = found["bits_per_byte"], ("failure", "tokens", "inherited")
        return {"score": None if bits is None else -bits, **{key: found[key] for key in kept}}
