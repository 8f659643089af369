"""A scaling fit: one design trained at several widths, at rates carried over by muP, and the law.

journal.jsonl of its folder    "sized": one training; what is there is not trained again
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec, mup_spec
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.results.scaling_law import ScalingLaw
from kizzasi.nas.spaces.resize import widened
from kizzasi.nas.study.journal import Journal


@dataclass(frozen=True)
class Sized:
    """The design at one size.

    Args:
        spec: with its logits scaled for muP.
        params: embeddings included.
        budget: tokens of each training.
        scores: by seed; None where a training failed.
    """

    spec: ModelSpec
    params: int
    budget: int
    scores: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        known = [score for score in self.scores if score is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Scaling:
    """What a scaling fit found.

    Args:
        law: through every training of `sizes`.
        sizes: that it was fitted on, small first.
        next: one more size, with scores if it was trained to check the law.
    """

    law: ScalingLaw
    sizes: tuple[Sized, ...]
    next: Sized

    @property
    def predicted(self) -> tuple[float, float, float]:
        """The next size's mean over as many seeds, with its 95 % interval."""
        return self.law.predict(self.next.params, max(1, len(self.sizes[0].scores)))

    @property
    def held(self) -> bool | None:
        """Whether the next size's mean lies in the interval; None if it was not trained."""
        _, low, high = self.predicted
        return None if self.next.mean is None else low <= self.next.mean <= high


def scaling_fit(
    spec: ModelSpec,
    evaluator: MicroTrain,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    shares: Sequence[float] = (0.25, 0.5, 1.0),
    next_share: float = 2.0,
    budget: int,
    seeds: int = 3,
    check: bool = False,
    device: str = "cpu",
    report: Callable[[int], object] = lambda n: None,
) -> Scaling:
    """Train a design at several widths and say what the next one will reach.

    Tokens grow with parameters, so that all sizes see as many of them for each parameter. Rates are
    those of `spec`, carried over by muP.

    Args:
        spec: the design, at the size that its settings were found at.
        evaluator: its task and recipe; the metric must be a loss above 0.
        settings: of every training, such as {"lr": 0.016}.
        folder: of the journal; made when missing.
        shares: sizes to train, as shares of the spec's parameters; two or more.
        next_share: the size to predict.
        budget: tokens of a training at the spec's own size.
        seeds: trainings of each size.
        check: train the next size, too.
        device: "cpu", "cuda:0", ...
        report: told of every finished part of a budget.

    Raises:
        SpecError: no such width, or the metric is no loss.
        StudyError: every training of a size failed; says why. The folder is another fit's.
    """
    if not evaluator.metric.lower_is_better:
        raise SpecError(f"metric: {evaluator.metric.name} is no loss; a power law needs one")
    base = spec
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / "journal.jsonl") as journal:
        facts = {
            "base": base.digest,
            "data": evaluator.task.digest,
            "settings": dict(settings),
            "recipe": repr(replace(evaluator.recipe, horizon=1)),
        }
        known = next((e for e in journal.events if e["event"] == "scaling"), None)
        if known is None and journal.events:
            raise StudyError(f"{folder}: holds another kind of run; give a folder of its own")
        if known is None:
            journal.append({"event": "scaling", **facts})
        elif other := [name for name in facts if known.get(name) != facts[name]]:
            raise StudyError(f"{folder}: holds another fit; {', '.join(other)} differ")
        trained = _Trained(journal, replace(evaluator, base=base), settings, seeds, device, report)
        n = base.cost(1).params

        def sized(share: float, *, really: bool = True) -> Sized:
            twin = base if share == 1 else widened(base, round(share * n))
            wide, params = mup_spec(twin, base), twin.cost(1).params
            tokens = max(evaluator.recipe.tokens_per_step, round(budget * params / n))
            return Sized(wide, params, tokens, trained(wide, tokens) if really else ())

        sizes = tuple(sized(share) for share in sorted(shares))
        points = [(s.params, y) for s in sizes for y in s.scores if y is not None]
        law = ScalingLaw.fit([x for x, _ in points], [y for _, y in points])
        return Scaling(law, sizes, sized(next_share, really=check))


@dataclass(frozen=True)
class _Trained:
    """Trainings of a fit, each done once."""

    journal: Journal
    evaluator: MicroTrain
    settings: Mapping[str, Any]
    seeds: int
    device: str
    report: Callable[[int], object]

    def __call__(self, spec: ModelSpec, tokens: int) -> tuple[float | None, ...]:
        found = [self._once(spec, tokens, seed) for seed in range(1, 1 + self.seeds)]
        if all(event["score"] is None for event in found):
            raise StudyError(f"every training at {spec.d_model} failed: {found[0]['failure']}")
        return tuple(event["score"] for event in found)

    def _once(self, spec: ModelSpec, tokens: int, seed: int) -> dict[str, Any]:
        own = {"spec": spec.digest, "tokens": tokens, "seed": seed}
        for event in self.journal.events:
            if event["event"] == "sized" and {k: event[k] for k in own} == own:
                return event
        job = Job(spec, tokens, seed, self.settings, tokens, device=self.device)
        measured = self.evaluator(job, self.report)
        return self.journal.append(
            {"event": "sized", **own, "score": measured.score, "failure": measured.failure}
        )
