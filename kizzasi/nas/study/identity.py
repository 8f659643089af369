"""What a run is: written down when it begins, and compared when it is resumed.

Digests and settings are the run's identity; paths are notes, so that a moved file or folder is the
same search. Budgets that only grow are no other search: it goes on from what it has.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kizzasi
from kizzasi.errors import StudyError
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.results.extended import current
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.journal import read_run
from kizzasi.nas.study.plan import Plan
from kizzasi.nas.study.study import Study
from kizzasi.nas.study.warm import SAME
from kizzasi.progress import Line
from kizzasi.train.bytes import baselines_of
from kizzasi.train.task import Metric

# What version 0.1 did where its journals say nothing.
OF_OLD: dict[str, Any] = {"test_fraction": 0.0, "optimizer": "adamw", "test": None}
GROWING = ("n_pool", "search_tokens", "n_finalists", "final_seeds", "slope_seeds")
WHY = {
    **dict.fromkeys(GROWING, "it may only grow"),
    "rungs": "every training's learning rate falls until the last rung, so all would be others",
    "final_tokens": "a final training's learning rate falls until then, so all would be others",
}


def versions() -> dict[str, str]:
    """Of what computes: results need not be the same to the last digit with others."""
    return {
        "kizzasi": kizzasi.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def begin(study: Study, plan: Plan) -> None:
    """Write down what the run is; a resumed run must be the same one, or the same with more.

    Raises:
        StudyError: the journal is another search's; names what differs.
    """
    event = study.once("study", lambda: _facts(plan, study))
    changed = _changes(event, plan)
    if changed and not study.scores:  # nothing was trained yet, so nothing is lost
        study.clear()
        study.once("study", lambda: _facts(plan, study))
        return
    other = [key for key in changed if not _grown(key, *changed[key])]
    if other:
        given = ", ".join(f"{k}: {changed[k][0]} then, {changed[k][1]} now" for k in other)
        because = dict.fromkeys(WHY[key] for key in other if key in WHY)
        given = "; ".join([f"{given:.300}", *because])
        folder = study.checkpoints.parent
        way = _way_on(folder, other, plan)
        raise StudyError(f"{folder}: cannot resume another search; {given}{way}")
    then, now = event.get("versions", {}), versions()
    if told := ", ".join(f"{k} {then[k]} then, {now[k]} now" for k in then if then[k] != now[k]):
        study.bar.write(f"resumed with other versions: {told}")
    if changed:
        study.append({"event": "extended", "config": {k: v for k, (_, v) in changed.items()}})


def _way_on(folder: Path, other: Sequence[str], plan: Plan) -> str:
    """How a search that is another one may begin with what this one found, where it may."""
    elsewhere = "vocab_size" in plan.described  # by ask and tell, which know no warm start
    if elsewhere or {"data digest", "evaluator", *SAME} & set(other):
        return ""
    how = f"--warm {folder}" if "n_pool" in plan.described else f'warm=["{folder}"]'
    return f"; in another folder it may begin with what was found here, by {how}"


@dataclass(frozen=True)
class Settings:
    """What a journal says of a search that was made of names: its config, and its space where that
    came from a file."""

    config: dict[str, Any]
    space: ModelSpace | None


def settings_of(path: Path) -> Settings | None:
    """The settings of the search in a journal; None if none has begun there.

    Raises:
        StudyError: the journal is damaged, or of a search made of objects.
    """
    if not path.exists():
        return None
    study = next((e for e in current(read_run(path)) if e["event"] == "study"), None)
    if study is None:
        return None
    config = study["config"]
    if "n_pool" not in config:
        raise StudyError(f"{path}: of a search made of objects; resume it with Search(..).run")
    of_old = {**_json(SearchConfig().to_dict()), **OF_OLD}
    named = {key: value for key, value in {**of_old, **config}.items() if key in of_old}
    template = config["template"]  # as it was then, also where a ready-made space has changed
    layered = isinstance(template, Mapping) and "model_types" not in template
    return Settings(named, ModelSpace(template) if layered else None)


def _facts(plan: Plan, study: Study) -> dict[str, Any]:
    task = plan.evaluator.task if isinstance(plan.evaluator, MicroTrain) else None
    facts: dict[str, Any] = {"data": {}, "baselines": {}}
    if task is not None:
        named = {"name": task.name, "digest": task.digest}
        line = study.bar
        beside = baselines_of(task, line) if isinstance(line, Line) else task.baselines()
        facts = {"data": {**named, **task.facts()}, "baselines": beside}
    metric = {k: v for k, v in vars(plan.metric).items() if v != getattr(Metric(""), k)}
    config = dict(plan.described)
    return {"config": config, "metric": metric, **facts, "versions": versions()}


def _changes(event: Mapping[str, Any], plan: Plan) -> dict[str, tuple[Any, Any]]:
    """What was and is otherwise, by name."""
    task = plan.evaluator.task if isinstance(plan.evaluator, MicroTrain) else None
    config = event["config"]
    named = "n_pool" in config
    of_old = {**_json(SearchConfig().to_dict()), **OF_OLD} if named else {}
    now = {**_json(dict(plan.described)), "data digest": task and task.digest}
    then = {**of_old, **config, "data digest": event["data"].get("digest")}
    notes = {"data"} if named else set()
    if named and then.get("template") == now.get("template"):
        notes.add("space")
    if named:  # None is the usual number
        for each in (then, now):
            if each["n_pool"] is None:
                each["n_pool"] = SearchConfig(searcher=each["searcher"]).pool
    return {
        key: (then.get(key), now[key])
        for key in now
        if key not in notes and now[key] != then.get(key)
    }


def _grown(key: str, then: Any, now: Any) -> bool:
    return key in GROWING and isinstance(then, int) and isinstance(now, int) and now > then


def _json(value: Any) -> Any:
    """Plain data as the journal gives it back: tuples are lists."""
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if isinstance(value, dict):
        return {key: _json(v) for key, v in value.items()}
    return value
