"""A search whose trainings happen elsewhere: ask for jobs, tell what they gave.

All state is the journal of the run's folder. So any program in any language may train, one or many,
on any machines, and be killed at any moment; asking twice gives the same jobs. What is asked for
next depends on the order in which measurements are told, which the journal has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kizzasi.documents import cut
from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec, Tokens
from kizzasi.models.stems import StemSpec
from kizzasi.nas.evaluators.evaluator import Job, Measurement, Report
from kizzasi.nas.executors.elsewhere import Elsewhere, WaitingError
from kizzasi.nas.report.found import Found
from kizzasi.nas.results.events import count, list_of, maybe, number, point, record, text
from kizzasi.nas.search import run_plan
from kizzasi.nas.spaces.describe import spec_of
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.ready_made import read_space
from kizzasi.nas.spaces.stem import Stem
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.folder import JOURNAL
from kizzasi.nas.study.identity import settings_of
from kizzasi.nas.study.journal import read_run
from kizzasi.nas.study.named import plan_of
from kizzasi.nas.study.plan import Plan
from kizzasi.progress import Line
from kizzasi.strict import unknown_name
from kizzasi.train.task import Metric

FIELDS = record(
    id=text,
    score=maybe(number),
    failure_=maybe(text),
    spent_=count,
    seconds_=number,
    curve_=list_of(point),
)
NAMES = ("id", "score", "failure", "spent", "seconds", "curve")


@dataclass(frozen=True)
class Outside:
    """What stands for the evaluator: somebody else."""

    stem: Stem
    metric: Metric

    def __call__(self, job: Job, report: Report) -> Measurement:
        raise AssertionError("an executor of jobs elsewhere calls nobody")


def begun(folder: Path) -> bool:
    """Whether a search has begun in a folder."""
    return settings_of(folder / JOURNAL) is not None


def plan_elsewhere(config: SearchConfig, metric: Metric, vocab_size: int = 256) -> Plan:
    """The search that a config describes, without data of its own.

    Args:
        config: names and numbers; what concerns data and training is not read.
        metric: of the scores that will be told.
        vocab_size: of the models, where their space does not say what they read.

    Raises:
        SpecError: the config breaks a rule.
    """
    space = read_space(config.space, Tokens(vocab_size), config.n_params)
    return _plan(config, space, metric, vocab_size)


def plan_in(folder: Path) -> Plan:
    """The search that a folder's journal holds. Raises StudyError if there is none."""
    told = settings_of(folder / JOURNAL)
    if told is None:
        raise StudyError(f"{folder}: holds no search; begin one with kizzasi ask --config FILE")
    study = next(e for e in read_run(folder / JOURNAL) if e["event"] == "study")
    if "vocab_size" not in study["config"]:
        raise StudyError(f"{folder}: holds a search that trains itself; use kizzasi search")
    config = SearchConfig.from_dict(told.config)
    size, metric = study["config"]["vocab_size"], Metric.from_dict(study["metric"])
    space = told.space or read_space(config.space, Tokens(size), config.n_params)
    return _plan(config, space, metric, size)


def _plan(config: SearchConfig, space: Any, metric: Metric, vocab_size: int) -> Plan:
    config = replace(config, proxies=())
    if config.screens:
        raise SpecError("screens: they train or look at data, which is elsewhere; leave them out")
    given = space.template.get("stem") if isinstance(space, ModelSpace) else None
    stem: Any = Tokens(vocab_size) if given is None else StemSpec.from_dict(given, "stem")
    outside = Outside(stem, metric)
    plan = plan_of(config, outside, space)  # pyright: ignore[reportArgumentType]
    return replace(plan, evaluator=outside, described={**plan.described, "vocab_size": vocab_size})


def ask(plan: Plan, folder: Path, n: int | None = None) -> list[Mapping[str, Any]] | Found:
    """The jobs that are handed out and not told yet, or what was found when there are no more.

    Args:
        plan: of the search.
        folder: of the run.
        n: jobs side by side; None takes as many as before, or one. Of final trainings all are
            handed out at once.

    Raises:
        StudyError: another program writes the journal, or it is another search's.
    """
    if n is not None and n < 1:
        raise SpecError(f"n: {n} jobs are none; give at least 1")
    return _go_on(plan, folder, Elsewhere(plan.evaluator, n or _places(folder) or 1))


def tell(plan: Plan, folder: Path, lines: Iterable[str]) -> int:
    """Write down measurements, and say how many there were.

    Args:
        plan: of the search.
        folder: of the run.
        lines: a JSON object each: the id of a job and its score, or a spec that is to take part;
            blank ones are passed over.

    Raises:
        StudyError: a line is not what it should be, its job is not one that was asked for, or its
            spec is none that can take part; names all such lines, and nothing is written.
    """
    places = _places(folder)
    if places is None:
        raise StudyError(f"{folder}: nothing was asked for yet; begin with kizzasi ask")
    told, faults, at = {}, dict[int, str](), dict[str, int]()
    specs: list[ModelSpec] = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            read = _read(line)
            if "spec" in read:
                specs.append(_own(read, plan))
                continue
            key, measured = measurement(read)
            if key in told:
                raise StudyError(f"id: {key} stands in line {at[key]} already")
            told[key], at[key] = measured, i
        except StudyError as error:
            faults[i] = str(error)
    waiting = Elsewhere(plan.evaluator, places)
    _go_on(plan, folder, waiting)
    for key, i in at.items():
        if key not in waiting.jobs:
            known = unknown_name(key, waiting.jobs) if waiting.jobs else "no job waits"
            faults[i] = f"id: {cut(key)} was not asked for, or is told already; {known}"
    if faults:
        raise FaultsError([f"line {i}: {faults[i]}" for i in sorted(faults)])
    for key, measured in told.items():
        spent = measured.spent or waiting.jobs[key].budget if measured.score is not None else 0
        told[key] = replace(measured, spent=spent)
    _go_on(plan, folder, Elsewhere(plan.evaluator, places, told), specs)
    return len(told) + len(specs)


class FaultsError(StudyError):
    """Faults that are told in a line each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


def _read(line: str) -> dict[str, Any]:
    """The object in a line of JSON. Raises StudyError saying what is wrong."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON; tell a failed trial by a score of null")

    try:
        found = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise StudyError("expected a mapping")
    return found


def _own(found: Mapping[str, Any], plan: Plan) -> ModelSpec:
    """The spec in a line, which keeps every rule of models and all bounds of the search."""
    if found.keys() != {"spec"}:
        others = ", ".join(map(cut, found.keys() - {"spec"}))
        raise StudyError(
            f"spec: stands alone in its line; leave {others} out, and tell the score "
            "of its job when that was asked for"
        )
    try:
        spec = ModelSpec.from_dict(found["spec"], "spec")
        spec.check()
        refusal = plan.constraints.analytic_refusal(spec_of(spec, plan.stem))
    except (SpecError, RecursionError) as error:
        raise StudyError(str(error)) from error
    if refusal:
        raise StudyError(f"spec: {refusal}, which bounds this search")
    return spec


def measurement(found: Mapping[str, Any]) -> tuple[str, Measurement]:
    """The id and the measurement in a line. Raises StudyError saying what is wrong."""
    if fault := FIELDS(found):
        raise StudyError(fault)
    for name in found:
        if name not in NAMES:
            raise StudyError(f"{cut(name)}: {unknown_name(name, NAMES)}")
    failure = found.get("failure")
    if (found["score"] is None) != bool(failure):
        raise StudyError("score, failure: give a score, or a score of null and the reason")
    curve = tuple(map(tuple, found.get("curve", ())))
    return found["id"], Measurement(
        found["score"],
        spent=found.get("spent", 0),
        seconds=found.get("seconds", 0.0),
        curve=curve,
        failure=failure,
    )


def _places(folder: Path) -> int | None:
    """How many jobs were handed out at once when somebody last asked."""
    path = folder / JOURNAL
    events = read_run(path) if path.exists() else []
    return next((e["places"] for e in reversed(events) if e["event"] == "session"), None)


def _go_on(
    plan: Plan, folder: Path, executor: Elsewhere, specs: Sequence[ModelSpec] = ()
) -> list[Mapping[str, Any]] | Found:
    """Run a search as far as the measurements that are there allow."""
    line = Line("ask", hidden=True)
    try:
        return run_plan(plan, folder, lambda _: executor, resume=True, line=line, proposed=specs)
    except WaitingError:
        return [_asked(job) for job in executor.jobs.values()]


def _asked(job: Job) -> Mapping[str, Any]:
    return {
        "id": job.key,
        "budget": job.budget,
        "horizon": job.horizon,
        "seed": job.seed,
        "settings": dict(job.settings),
        "checkpoint": str(job.checkpoint),
        "spec": job.spec.to_dict(),
    }
