"""What an evaluator is: any callable that says what a candidate is worth.

def evaluate(job, report):
    model = build_model(job.spec, seed=job.seed, device=job.device)
    ...                                       # any loop; report(n) tells of n more of the budget
    return Measurement(score, spent=job.budget)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kizzasi.models import ModelSpec
from kizzasi.train.task import Split

Report = Callable[[int], object]  # told of every finished part of the budget


@dataclass(frozen=True)
class Job:
    """One training, or its continuation, up to one budget.

    Args:
        spec: what to train.
        budget: in the unit of the scheduler, earlier rungs included: tokens, or your own.
        seed: of everything random.
        settings: what the search chooses beside the spec, such as {"lr": 0.002}.
        horizon: the budget that this training would end with if it passes every rung.
        checkpoint: a path of this training's own. What the evaluator leaves there, a file or a
            folder, is there when the same training goes on; None keeps nothing. A model saved there
            by `save_pretrained` is what the search calls the winner's weights.
        device: "cpu", "cuda:0", ...
        split: which part of the data to score; "test" only once, for finalists.
        key: the trial's id, unique in a study.
        kind: "train"; an evaluator that is handed to a search never sees another one.
        parent: with kind "child", the training that the weights come from.
    """

    spec: ModelSpec
    budget: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    horizon: int = 0
    checkpoint: Path | None = None
    device: str = "cpu"
    split: Split = "valid"
    key: str = ""
    kind: str = "train"
    parent: Job | None = None


@dataclass(frozen=True)
class Measurement:
    """What an evaluator found.

    Args:
        score: on held-out data; None if the trial failed.
        spent: of the budget in total, earlier rungs included.
        seconds: of training in this call, scoring left out.
        per_second: of the budget, in this call; None if it only scored.
        curve: [spent, training loss] pairs.
        failure: why the trial stopped, None if it did not.
        values: the score of every held-out window, where it is known.
        facts: whatever else was found, as plain data; recorded, never decisive.
    """

    score: float | None
    spent: int = 0
    seconds: float = 0.0
    per_second: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    failure: str | None = None
    values: tuple[float, ...] | None = None
    facts: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values; values of windows and further facts only where they are known."""
        facts = dict(vars(self))
        facts["tokens"], facts["tokens_per_second"] = facts.pop("spent"), facts.pop("per_second")
        for name in ("values", "facts"):
            if facts[name] is None:
                del facts[name]
        return facts

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Measurement:
        """Of an event that holds what `to_dict` gave, among other things."""
        values = facts.get("values")
        return cls(
            facts["score"],
            spent=facts["tokens"],
            seconds=facts["seconds"],
            per_second=facts["tokens_per_second"],
            curve=tuple(map(tuple, facts["curve"])),
            failure=facts["failure"],
            values=None if values is None else tuple(values),
            facts=facts.get("facts"),
        )


class Evaluator(Protocol):
    """Trains and scores. It is copied to workers, so it must be picklable: a function of a module,
    or a dataclass."""

    def __call__(self, job: Job, report: Report, /) -> Measurement | float: ...
