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
from kizzasi.nas.executors.job import EXPLOSIONS, USERS_ERRORS
from kizzasi.nas.study.candidates import VOCAB, zero_cost
from kizzasi.nas.study.config import ANALYTIC, INHERIT
from kizzasi.nas.study.study import Study, Trial

C = TypeVar("C")


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
