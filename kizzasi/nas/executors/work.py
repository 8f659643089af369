"""What the workers of a search do: trainings, and what judges candidates before they are trained.

Kinds of jobs
    train      the evaluator's own
    proxies    settings {"names": ...}: zero-cost scores
    probe      settings {"by": ...}: a small task of its own
    child      a short training that begins with the weights of the job `parent`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kizzasi.models import ModelSpec, build_model
from kizzasi.nas.evaluators.evaluator import Job, Measurement, Report
from kizzasi.nas.evaluators.inherit import train_child
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.evaluators.probes import PROBES
from kizzasi.nas.evaluators.zero_cost import PROXIES, Batch
from kizzasi.nas.executors.execute import EXPLOSIONS
from kizzasi.train.seeds import derive_seed
from kizzasi.train.task import Shape

PROXY_SHAPE = (64, 4)  # length and number of the windows that zero-cost proxies look at


@dataclass(frozen=True)
class Work:
    """An evaluator that also does the other kinds of jobs.

    Args:
        train: the evaluator of the search.
        seed: of the search.
    """

    train: MicroTrain
    seed: int

    def __call__(self, job: Job, report: Report) -> Measurement:
        kinds: dict[str, Callable[[], Measurement]] = {
            "train": lambda: self.train(job, report),
            "proxies": lambda: self._proxies(job),
            "probe": lambda: self._probe(job),
            "child": lambda: self._child(job, report),
        }
        return kinds[job.kind]()

    def _proxies(self, job: Job) -> Measurement:
        found = zero_cost(job.spec, job.settings["names"], self.batch(), self.seed)
        return Measurement(None, facts=found)

    def batch(self) -> Batch:
        """What zero-cost proxies look at."""
        task, recipe = self.train.task, self.train.recipe
        shape = Shape(min(PROXY_SHAPE[0], recipe.seq_len), PROXY_SHAPE[1])
        return next(iter(task.batches("train", derive_seed(self.seed, "proxies"), 0, shape)))

    def _probe(self, job: Job) -> Measurement:
        probed = PROBES[job.settings["by"]](job.spec, self.seed, job.device)
        return Measurement(probed.accuracy, failure=probed.failure)

    def _child(self, job: Job, report: Report) -> Measurement:
        """Train it for a while, with its parent's settings, from its parent's weights."""
        parent = job.parent
        assert parent is not None, "a child has a parent"
        assert parent.checkpoint is not None, "a parent has weights"
        trained = self.train.training(replace(parent, device=job.device))
        trained.restore(parent.checkpoint)
        found = train_child(
            self.train,
            job.spec,
            trained.model,
            job.budget,
            self.seed,
            parent_tokens=trained.tokens,
            settings=parent.settings,
            device=job.device,
        )
        report(job.budget)
        return replace(found.measurement, facts={"inherited": found.to_dict()["inherited"]})


def zero_cost(spec: ModelSpec, names: Sequence[str], batch: Batch, seed: int) -> dict[str, Any]:
    """Scores without training, by name; null where a proxy failed, with its reason."""
    scores: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    model = None
    for name in names:
        try:
            model = build_model(spec, seed=seed) if model is None else model
            scores[name] = PROXIES[name](model, batch)
        except EXPLOSIONS as error:
            scores[name], failures[name] = None, repr(error)
    return {"proxies": scores, **({"proxy_failures": failures} if failures else {})}
