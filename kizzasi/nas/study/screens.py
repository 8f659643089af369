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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.inherit import train_child
from kizzasi.nas.evaluators.probes import PROBES
from kizzasi.nas.evaluators.zero_cost import Batch
from kizzasi.nas.executors.execute import EXPLOSIONS, USERS_ERRORS
from kizzasi.nas.spaces.describe import spec_of
from kizzasi.nas.study.candidates import zero_cost
from kizzasi.nas.study.config import ANALYTIC, INHERIT
from kizzasi.nas.study.plan import Plan
from kizzasi.nas.study.study import Study, Trial

C = TypeVar("C")


@dataclass(frozen=True)
class Screen:
    """A judge that writes down what it finds, so that a resumed search chooses alike.

    Args:
        by: one of SCREENS.
        plan: of the search.
        study: whose journal serves.
        batch: what zero-cost proxies look at.
        last_trial: the last training of a candidate's model, None unless its checkpoint is kept.
        device: where probes and children train.
    """

    by: str
    plan: Plan
    study: Study
    batch: Callable[[], Batch]
    last_trial: Callable[[ModelSpec], Trial | None]
    device: str

    def __call__(self, draw: Any, parent: Any) -> float | None:
        if self.by == ANALYTIC:
            return draw.proxy_score()
        spec, trial = spec_of(draw, self.plan.stem), None
        if self.by == INHERIT:
            if parent is not None:
                trial = self.last_trial(spec_of(parent, self.plan.stem))
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
        seed = self.plan.seed
        try:
            if parent is not None:
                return self._child(spec, parent)
            if self.by in PROBES:
                probed = PROBES[self.by](spec, seed, self.device)
                return {"score": probed.accuracy, "failure": probed.failure}
        except USERS_ERRORS:
            raise
        except EXPLOSIONS as error:
            return {"score": None, "failure": repr(error)}
        found = zero_cost(spec, (self.by,), self.batch(), seed)
        failure = found.get("proxy_failures", {}).get(self.by)
        return {"score": found["proxies"][self.by], "failure": failure}

    def _child(self, spec: ModelSpec, parent: Trial) -> dict[str, Any]:
        """Train it for a while, with its parent's settings, from its parent's weights."""
        evaluator, tokens = self.plan.micro_training, self.plan.screen_tokens
        trained = evaluator.training(replace(self.study.job(parent), device=self.device))
        trained.restore(self.study.checkpoint(parent))
        found = train_child(
            evaluator,
            spec,
            trained.model,
            tokens,
            self.plan.seed,
            parent_tokens=trained.tokens,
            settings=parent.settings,
            device=self.device,
        ).to_dict()
        score, kept = found["score"], ("failure", "tokens", "inherited")
        worth = None if score is None else -self.plan.metric.sign * score
        return {"score": worth, **{key: found[key] for key in kept}}
