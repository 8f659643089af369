"""`TrainedTable`: a space whose models are all trained already, and what came of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Job, Measurement, Report
from kizzasi.nas.spaces.model_space import ModelSpace, name_of
from kizzasi.strict import require


@dataclass(frozen=True)
class Row:
    """One model of a table. Lower scores are better.

    Args:
        spec: its architecture.
        valid: by seed, the score on valid data at every rung.
        test: by seed, the score on test data at the end.
        facts: whatever else is known of it, by name: parameters, state bytes, proxies, ...
    """

    spec: ModelSpec
    valid: Mapping[int, tuple[float, ...]]
    test: Mapping[int, float]
    facts: Mapping[str, float | None]

    def mean(self, split: Literal["valid", "test"] = "test") -> float:
        """The score at the end, mean over the seeds."""
        ends = self.test.values() if split == "test" else (v[-1] for v in self.valid.values())
        return statistics.fmean(ends)


@dataclass(frozen=True)
class TrainedTable:
    """Every model of a space, trained. As an evaluator it answers a search's jobs at once.

    Args:
        about: how it was made: "template" of the space, "rungs", and whatever a reader needs.
        rows: one a model.
    """

    about: Mapping[str, Any]
    rows: tuple[Row, ...]

    @classmethod
    def from_json(cls, text: str) -> TrainedTable:
        """Raises SpecError if a row is of no model of the space, or a model has none."""
        data = json.loads(text)
        about, names, found = data["about"], data["facts"], data["rows"]
        specs = [candidate.spec for candidate in _space(about).iterate()]
        require(len(specs) == len(found), "rows", f"{len(found)} for {len(specs)} models")
        rows = (
            Row(
                spec=spec,
                valid={seed: tuple(scores) for seed, scores in enumerate(valid) if scores},
                test={seed: score for seed, score in enumerate(test) if score is not None},
                facts=dict(zip(names, facts, strict=True)),
            )
            for spec, (valid, test, facts) in zip(specs, found, strict=True)
        )
        return cls(about, tuple(rows))

    @property
    def rungs(self) -> tuple[int, ...]:
        """Budgets at which every model was scored, rising."""
        return tuple(self.about["rungs"])

    @cached_property
    def space(self) -> ModelSpace:
        return _space(self.about)

    @cached_property
    def _rows(self) -> dict[str, Row]:
        return {row.spec.digest: row for row in self.rows}

    def row(self, spec: ModelSpec) -> Row:
        """What is known of a model. Raises SpecError if it is none of the space."""
        found = self._rows.get(spec.digest)
        if found is None:
            raise SpecError(f"{name_of(spec)}: no model of this table; see its `space`")
        return found

    @cached_property
    def best(self) -> Row:
        """The row of the best mean on test data."""
        return min(self.rows, key=Row.mean)

    def regret(self, spec: ModelSpec) -> float:
        """How far a model's mean on test data is from the best of the table."""
        return self.row(spec).mean() - self.best.mean()

    def rank(self, spec: ModelSpec) -> int:
        """Place by the mean on test data, from 1."""
        mean = self.row(spec).mean()
        return 1 + sum(row.mean() < mean for row in self.rows)

    def __call__(self, job: Job, report: Report) -> Measurement:
        """Answer a job: the score of its model at its budget.

        A seed stands for one of the table's: job.seed modulo their number. Raises SpecError for a
        model of another space, or a budget that is no rung.
        """
        row = self.row(job.spec)
        if job.budget not in self.rungs:
            raise SpecError(f"budget {job.budget}: the table has {_listed(self.rungs)} alone")
        seed = sorted(row.test)[job.seed % len(row.test)]
        score = row.valid[seed][self.rungs.index(job.budget)]
        if job.split == "test":
            score = row.test[seed]
        report(job.budget)
        return Measurement(score, spent=job.budget)


def _space(about: Mapping[str, Any]) -> ModelSpace:
    return ModelSpace(about["template"])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{n:,}" for n in numbers)


def to_json(
    about: Mapping[str, Any],
    names: Sequence[str],
    rows: Iterable[tuple[Sequence[Any], Sequence[Any], Sequence[Any]]],
) -> str:
    """What `TrainedTable.from_json` reads, a line for each row.

    Args:
        about: see `TrainedTable`.
        names: of the facts.
        rows: in the order of the space: valid scores by seed and rung, test scores by seed (None
            where there is none), facts.
    """
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    head = f'"about":{json.dumps(dict(about))},\n"facts":{json.dumps(list(names))}'
    return f'{{{head},\n"rows":[\n{lines}\n]}}\n'
