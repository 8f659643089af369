"""Micro-training: a short, honest training run that scores an architecture on held-out windows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from kizzasi.models import ModelSpec, build_model
from kizzasi.nas.evaluators.evaluator import Job, Measurement, Report
from kizzasi.nas.spaces.describe import spec_of
from kizzasi.train import Recipe, Task, Training, derive_seed, find_leak
from kizzasi.train.task import Metric


@dataclass(frozen=True)
class MicroTrain:
    """The ready-made evaluator: train a spec on a task for a while, return its held-out score.

    A new model first passes the no-leak gate. If the job's checkpoint is there, training goes on
    from it; when the budget is reached, it is written anew. Seeds draw the initialisation, and the
    windows, which are equal for all specs.

    Args:
        task: what to learn.
        recipe: how; a job's settings (such as lr) and horizon take the place of its own.
        observe: looks at a training, before its first step ("start") and at its budget ("end");
            what it returns stands in the measurement's facts.
        base: the model that the rates of recipe and settings were found on, where the specs are
            wider or narrower ones of the same layers, from `mup_spec(spec, base)`.
    """

    task: Task
    recipe: Recipe
    observe: Callable[[Training], Mapping[str, Any]] | None = None
    base: ModelSpec | None = None

    @property
    def metric(self) -> Metric:
        return self.task.metric

    def __call__(self, job: Job, report: Report) -> Measurement:
        training = self.training(job)
        if job.checkpoint is not None and job.checkpoint.exists():
            training.restore(job.checkpoint)
        elif leak := leak_of(job.spec, self.recipe.seq_len, job.device):
            return Measurement(None, failure=leak)
        facts: dict[str, Any] = {}
        if self.observe is not None and training.tokens == 0:
            facts["start"] = self.observe(training)
        before, start = training.tokens, time.perf_counter()
        failure = training.run(job.budget, report)
        seconds = time.perf_counter() - start
        trained = training.tokens - before
        if job.checkpoint is not None and failure is None and trained:
            training.save(job.checkpoint)
        if self.observe is not None and failure is None:
            facts["end"] = self.observe(training)
        values = training.values("test").values if job.split == "test" and not failure else None
        return Measurement(
            score=None if failure else training.score(job.split),
            spent=training.tokens,
            seconds=seconds,
            per_second=trained / seconds if trained else None,
            curve=tuple(training.curve),
            failure=failure,
            values=None if values is None else tuple(values.tolist()),
            facts=facts or None,
        )

    def model_of(self, candidate: Any) -> ModelSpec:
        """The model of a candidate of any space, with the task's stem. Raises SpecError."""
        return spec_of(candidate, self.task.stem)

    def fitness(self, spec: ModelSpec) -> float:
        """Train a model to the recipe's horizon, with seed 0; its score, higher is better.

        Raises:
            RuntimeError: the training failed; says why.
        """
        found = self(Job(spec, self.recipe.horizon, 0), lambda n: None)
        if found.score is None:
            raise RuntimeError(found.failure)
        return -self.metric.sign * found.score

    def training(self, job: Job) -> Training:
        """A fresh training of the job's spec, for callers that want the model."""
        recipe = replace(self.recipe, horizon=job.horizon or job.budget, **job.settings)
        model = build_model(job.spec, seed=job.seed, device=job.device)
        data_seed = derive_seed(job.seed, "data")
        return Training(model, self.task, recipe, data_seed, base=self.base)


@lru_cache(maxsize=4096)
def leak_of(spec: ModelSpec, seq_len: int, device: str) -> str | None:
    """`find_leak` of a freshly built model, once for each spec and process."""
    return find_leak(build_model(spec, device=device), seq_len)
