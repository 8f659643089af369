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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.evaluators.probes import PROBES
from kizzasi.nas.results.words import gist
from kizzasi.nas.spaces.describe import spec_of
from kizzasi.nas.study.config import ANALYTIC, INHERIT
from kizzasi.nas.study.plan import Plan
from kizzasi.nas.study.study import Study, Task, Trial


@dataclass(frozen=True)
class Screen:
    """A judge that writes down what it finds, so that a resumed search chooses alike.

    The draws for one place are judged side by side, by whatever workers are free.

    Args:
        by: one of SCREENS.
        plan: of the search.
        study: whose journal and workers serve.
        last_trial: the last training of a candidate's model, None unless its checkpoint is kept.
    """

    by: str
    plan: Plan
    study: Study
    last_trial: Callable[[ModelSpec], Trial | None]

    def __call__(self, draws: Sequence[Any], parent: Any) -> list[float | None]:
        if self.by == ANALYTIC:
            return [draw.proxy_score() for draw in draws]
        trial = None
        if self.by == INHERIT:
            if parent is not None:
                trial = self.last_trial(spec_of(parent, self.plan.stem))
            if trial is None:
                return [None] * len(draws)
        specs = [spec_of(draw, self.plan.stem) for draw in draws]
        found = {spec: self._known(spec, trial) for spec in specs}
        tasks = {spec: self._task(spec, trial) for spec, event in found.items() if event is None}
        events = self.study.all_of(list(tasks.values()))
        found.update((spec, events[task.key]) for spec, task in tasks.items())
        return [(found[spec] or {}).get("score") for spec in specs]

    def _known(self, spec: ModelSpec, parent: Trial | None) -> dict[str, Any] | None:
        return self.study.find("screen", **self._match(spec, parent))

    def _match(self, spec: ModelSpec, parent: Trial | None) -> dict[str, Any]:
        return {"id": spec.digest[:12], "by": self.by, "parent": parent and parent.id}

    def _task(self, spec: ModelSpec, parent: Trial | None) -> Task:
        match = self._match(spec, parent)
        key = " ".join(("screen", *map(str, match.values())))
        tokens, seed = self.plan.screen_tokens, self.plan.seed
        if parent is not None:
            job = Job(spec, tokens, seed, key=key, kind="child", parent=self.study.job(parent))
        elif self.by in PROBES:
            job = Job(spec, 0, seed, {"by": self.by}, key=key, kind="probe")
        else:
            job = Job(spec, 0, seed, {"names": (self.by,)}, key=key, kind="proxies")
        return Task(job, lambda measured: {"event": "screen", **match, **self._found(measured)})

    def _found(self, measured: Measurement) -> dict[str, Any]:
        facts = measured.facts or {}
        if "proxies" in facts:
            failure = facts.get("proxy_failures", {}).get(self.by)
            return {"score": facts["proxies"][self.by], "failure": failure}
        failure = measured.failure and gist(measured.failure)
        if self.by != INHERIT:
            return {"score": measured.score, "failure": failure}
        score = None if measured.score is None else -self.plan.metric.sign * measured.score
        return {"score": score, "failure": failure, "tokens": measured.spent, **facts}
