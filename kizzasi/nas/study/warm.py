"""Warm starts: what earlier runs found, for a new search of the same task.

Candidates of the earlier run, best first, are those that the searcher begins with; a training that
was done there, the same to the seed, is not done again: its result arrives at once. All of it is
copied into the new journal, so that a resumed run needs no other file.

Journal:
    earlier    folder, spec, genotype, trials (events) of one candidate of an earlier run
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.results.finals import TEST, falling
from kizzasi.nas.results.summary import NEVER_WIN
from kizzasi.nas.spaces.families import ArchCandidate, ArchSearchSpace
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.study.folder import JOURNAL
from kizzasi.nas.study.journal import read_run
from kizzasi.nas.study.plan import Plan
from kizzasi.nas.study.study import EARLIER, Study
from kizzasi.train.task import Metric

Event = dict[str, Any]
# What a trial's id does not say of its training: settings of a config, or those of a `Search`.
SAME = ("seq_len", "batch_size", "score_windows", "optimizer", "precision", "accumulate")


def warmed(plan: Plan, study: Study, folders: Sequence[Path | str]) -> Plan:
    """The plan, beginning with what earlier runs found.

    Args:
        plan: of the search.
        study: begun; what was found is written into its journal, unless it is there already.
        folders: of earlier runs.

    Raises:
        StudyError: an earlier run is of another task or trained otherwise, or this one has begun
            without it.
    """
    if folders and not study.knows(EARLIER):
        if study.scores:
            raise StudyError(
                f"{study.checkpoints.parent}: a warm start comes before the first trial, and this "
                "run has some; begin a new run with it"
            )
        for folder in folders:
            for event in _found(Path(folder), plan):
                study.append(event)
    first = [_member(event, plan) for _, event in study.journal.scan(EARLIER)]
    known = [candidate for candidate in first if candidate is not None]
    return replace(plan, first=[*dict.fromkeys([*known, *plan.first])])


def _found(folder: Path, plan: Plan) -> Iterator[Event]:
    """Every candidate of an earlier run that has a score, the best of the deepest rung first."""
    events = read_run(folder / JOURNAL)
    study = next((event for event in events if event["event"] == "study"), None)
    if study is None:
        raise StudyError(f"{folder}: holds no search; give the folder of one")
    _require_same(folder, study, plan)
    trials: dict[str, list[Event]] = {}
    for event in events:
        if event["event"] == "trial" and event["score"] is not None and event["rung"] != TEST:
            trials.setdefault(event["candidate"], []).append(event)
    own = [e for e in events if e["event"] == "candidate" and e["id"] in trials]

    def place(candidate: Event) -> tuple[int, float]:
        deepest = max(trials[candidate["id"]], key=lambda trial: trial["tokens"])
        return -deepest["tokens"], falling(deepest, plan.metric.sign)["score"]

    for candidate in sorted(own, key=place):
        told = {key: candidate.get(key) for key in ("group", "spec", "genotype")}
        yield {"event": EARLIER, "folder": str(folder), **told, "trials": trials[candidate["id"]]}


def _require_same(folder: Path, study: Event, plan: Plan) -> None:
    task = plan.evaluator.task if isinstance(plan.evaluator, MicroTrain) else None
    metric = Metric.from_dict(study.get("metric", {"name": "bits/byte"}))
    pairs: dict[str, tuple[Any, Any]] = {
        "data digest": (study["data"].get("digest"), task and task.digest),
        "metric": (metric.name, plan.metric.name),
    }
    names = SAME if "n_pool" in study["config"] else ("evaluator",)
    pairs |= {name: (study["config"].get(name), plan.described.get(name)) for name in names}
    for name, (there, here) in pairs.items():
        if there != here:
            raise StudyError(
                f"{folder}: no warm start from it: {name} is {there!s:.80} there and {here!s:.80} "
                "here; leave it out, or train as it did"
            )


def _member(event: Mapping[str, Any], plan: Plan) -> Any:
    """The earlier candidate as one of this space that keeps the bounds, if it is one."""
    if event["group"] in NEVER_WIN:
        return None
    spec, space = ModelSpec.from_dict(event["spec"]), plan.space
    try:
        if plan.constraints.analytic_refusal(spec):
            return None
        if isinstance(space, ModelSpace):
            return space.encode(spec)
        if isinstance(space, ArchSearchSpace) and event["genotype"]:
            candidate = ArchCandidate(**event["genotype"])
            return candidate if space.contains(candidate) else None
    except (SpecError, TypeError):  # of a version that had other genes
        return None
    return None
