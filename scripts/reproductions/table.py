"""A table: the problem, its rows, and the trainings that fill them.

Glossary
    valid    examples that choose the learning rate
    column   examples that the chosen training is tested on
    rate     peak learning rate
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from kizzasi.models import BlockSpec, ModelSpec, build_model, mup_spec
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.mixer import MixerSpec
from kizzasi.train import Recipe, Task, Training
from kizzasi.train.synthetic import Examples, SyntheticTask

HELD_OUT = 256  # examples of a column
SOLVED = 0.999  # right answers on valid from which no further rate is tried


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: as printed.
        mixer: as data.
        published: what the source reports.
        d_model: None for the table's.
        base: width of the model whose rates are carried over to this one by muP; None without.
        optimizer: of all its trainings.
        rates: None for the table's.
    """

    name: str
    mixer: dict[str, Any]
    published: str = "-"
    d_model: int | None = None
    base: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Problem:
    """What is learnt.

    Args:
        task: to train on.
        seq_len: positions of its windows.
        columns: by name, tasks whose test split is scored, and positions of their windows.
    """

    task: Task
    seq_len: int
    columns: dict[str, tuple[Task, int]]


@dataclass(frozen=True)
class Table:
    """What one table trains.

    Args:
        source: paper, and its result in a few words.
        what: the problem in words.
        problem: made from a folder of data, or from None. Raises DataError.
        rows: the architectures.
        d_model, n_layers: of all rows; no channels, unless `hidden` is their width.
        steps, batch_size, rates, weight_decay: of every training.
        score_windows: held-out windows of a score; None for all.
        by_rate: the columns are rates, each with its score on valid.
        published: fields of this table that take the published setting; none if it has none here.
    """

    source: str
    what: str
    problem: Callable[[Path | None], Problem]
    rows: tuple[Row, ...]
    d_model: int = 64
    n_layers: int = 2
    hidden: int | None = None
    steps: int = 2000
    batch_size: int = 32
    rates: tuple[float, ...] = (1e-3, 4e-3)
    weight_decay: float = 0.0
    score_windows: int | None = None
    by_rate: bool = False
    published: dict[str, Any] = field(default_factory=dict)

    def setting(self) -> str:
        """Size and length in words."""
        hidden = "" if self.hidden is None else f" with SwiGLU of {self.hidden}"
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        layers = "layer" if self.n_layers == 1 else "layers"
        return (
            f"{self.what}; {self.n_layers} {layers} of {self.d_model}{hidden}, {self.steps:,} "
            f"steps of {self.batch_size}, rates {rates}"
        )

    def spec(self, row: Row, task: Task) -> ModelSpec:
        """The model of a row, its logits scaled where it is one of muP."""
        d_model = row.d_model or self.d_model
        channel = None
        if self.hidden is not None:  # in proportion to the width
            channel = SwiGLUSpec(hidden=self.hidden * d_model // self.d_model)
        block = BlockSpec(MixerSpec.from_dict(row.mixer), channel)
        spec = ModelSpec(d_model, (block,) * self.n_layers, task.stem)
        base = self.base(row, task)
        return spec if base is None else mup_spec(spec, base)

    def base(self, row: Row, task: Task) -> ModelSpec | None:
        """The narrow model that the rates of a row are of; None where they are its own."""
        if row.base is None:
            return None
        return self.spec(replace(row, d_model=row.base, base=None), task)


def asked(
    source: str,
    examples: Examples,
    columns: dict[str, Examples],
    rows: tuple[Row, ...],
    published: tuple[Examples, dict[str, Any]] | None = None,
    **options: Any,
) -> Table:
    """A table on a generator of examples, scored at the trained length and on further ones."""

    def fields_of(examples: Examples) -> dict[str, Any]:
        def problem(_data: Path | None) -> Problem:
            tests = {"trained length": examples, **columns}
            made = {name: SyntheticTask(each, HELD_OUT) for name, each in tests.items()}
            task = SyntheticTask(examples)
            return Problem(task, task.seq_len, {k: (v, v.seq_len) for k, v in made.items()})

        return {"what": repr(examples), "problem": problem}

    told = {} if published is None else {**fields_of(published[0]), **published[1]}
    return Table(source=source, rows=rows, published=told, **fields_of(examples), **options)


@dataclass(frozen=True)
class Outcome:
    """One training: its score on valid, and in every column; None where it diverged."""

    valid: float | None
    columns: list[float | None]


def train(
    table: Table, problem: Problem, row: Row, rate: float, seed: int, advance: Any
) -> Outcome:
    """One training and its scores."""
    task, seq_len = problem.task, problem.seq_len
    horizon = table.steps * table.batch_size * seq_len
    recipe = Recipe(
        horizon,
        seq_len,
        table.batch_size,
        rate,
        weight_decay=table.weight_decay,
        score_windows=table.score_windows,
        optimizer=row.optimizer,
    )
    model = build_model(table.spec(row, task), seed=seed)
    training = Training(model, task, recipe, data_seed=seed, base=table.base(row, task))
    if training.run(horizon, advance) is not None:
        return Outcome(None, [None] * len(problem.columns))
    valid, scores = training.score(), []
    for test, length in problem.columns.values():
        shape = replace(training.shape, seq_len=length)
        with torch.no_grad():
            values = test.score(training.model.eval(), "test", shape)
        scores.append(values.mean(test.metric))
    return Outcome(valid, scores)


def run(table: Table, problem: Problem, seeds: int, advance: Any) -> list[dict[str, Any]]:
    """Every row with its scores; `advance` is told the tokens of every step."""
    return [_row(table, problem, row, seeds, advance) for row in table.rows]


def _row(table: Table, problem: Problem, row: Row, seeds: int, advance: Any) -> dict[str, Any]:
    start, sign = time.perf_counter(), problem.task.metric.sign
    rates = row.rates or table.rates
    found: dict[float, list[Outcome]] = {}
    for rate in rates:
        every = range(seeds) if table.by_rate else range(1)
        found[rate] = [train(table, problem, row, rate, s, advance) for s in every]
        valid = found[rate][0].valid
        if problem.task.metric.name == "accuracy" and (valid or 0.0) >= SOLVED:
            break

    def falling(rate: float) -> float:
        known = [one.valid for one in found[rate]]
        return statistics.median(float("inf") if v is None else sign * v for v in known)

    best = min(found, key=falling)
    rest = range(len(found[best]), seeds)
    found[best] += [train(table, problem, row, best, s, advance) for s in rest]
    return {
        "name": row.name,
        "published": row.published,
        "params": table.spec(row, problem.task).cost(1).params,
        "rate": best,
        "valid": [one.valid for one in found[best]],
        "scores": [one.columns for one in found[best]],
        "by_rate": {f"{rate:g}": [one.valid for one in each] for rate, each in found.items()},
        "seconds": time.perf_counter() - start,
    }
