"""A study: trials meet the journal. What is in the journal is never run again.

Events of a run, one JSON object per line of journal.jsonl:

session    places, device, torch, kizzasi, ...: where the events after it come from; left out while
           nothing changes
study      config, metric {name, unit, lower_is_better, root}, data {name, digest, and more},
           baselines {name: score}, versions {kizzasi, torch, python}
extended   see `kizzasi.nas.results.extended`
measured   id, refusal (null, or the bound that this model breaks when it is run)
screen     see `kizzasi.nas.study.screens`
earlier    see `kizzasi.nas.study.warm`
proposed   see `kizzasi.nas.study.flow`
candidate  id, group ("preset", "proxy", "random", "searched" or "outside" the band), name, family,
           spec, proxy, params, estimated_params, state_bytes, genotype, parents (candidate ids),
           settings if they are the candidate's own
proxies    id (of the candidate), proxies {name: value or null}, proxy_failures {name: reason} if
           there are any; part of "candidate" in earlier journals
settings   family, candidate, scores {settings: score or null}, settings, edges {setting: "lowest"
           or "highest" of those tried} if it is one; a mean where several share a sweep
trial      id, candidate, rung ("0", "1", ..., "final", "test" or "narrow"), seed, settings,
           tokens, score, seconds, tokens_per_second, curve, failure, values of windows if known
saved      candidate, seed, files {name: sha256}: the best model, as it was put into the folder best
sample     candidate, seed, prompt, text: what the model in best writes, if it is of bytes
result     best, winner, preset (candidate ids), winner_trials, preset_trials (trial ids), ranking
           (candidate ids, best first), finalists [{candidate, mean, spread, trials}], noise {floor,
           seeds, freedom} or null, ties (candidate ids that noise does not tell from the winner),
           tokens (trained on rungs), refused {rule: candidates never built}; and what
           `kizzasi.nas.study.final_training` lists, with the event "narrow"
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.executors import Executor
from kizzasi.nas.executors.execute import Counter
from kizzasi.nas.results.extended import current
from kizzasi.nas.results.words import gist
from kizzasi.nas.study.journal import Journal
from kizzasi.train.task import Metric, Split

SORTED = json.JSONEncoder(sort_keys=True)
EARLIER = "earlier"  # the event of what an earlier run found; see `kizzasi.nas.study.warm`


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate that takes part in a study."""

    id: str
    group: str
    name: str
    family: str
    spec: ModelSpec
    proxy: float | None
    params: int
    estimated_params: int | None
    state_bytes: int
    genotype: tuple[tuple[str, Any], ...] | None = None
    parents: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None  # its own; None takes those of its family

    def to_event(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.settings is None:
            del own["settings"]
        genes = None if self.genotype is None else dict(self.genotype)
        return {"event": "candidate", **own, "genotype": genes, "spec": self.spec.to_dict()}


@dataclass(frozen=True)
class Trial:
    """One training of an entry, up to a rung."""

    entry: Entry
    rung: str
    seed: int
    settings: Mapping[str, Any]
    tokens: int
    horizon: int
    split: Split = "valid"

    @property
    def run_id(self) -> str:
        """Names the training across its rungs; its checkpoint has this name."""
        chosen = self.settings
        named = repr(chosen["lr"]) if [*chosen] == ["lr"] else SORTED.encode(chosen)
        text = f"{self.entry.spec.digest} {self.seed} {named} {self.horizon}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        scored = "" if self.split == "valid" else f"-{self.split}"
        return f"{self.run_id}-{self.tokens}{scored}"


@dataclass(frozen=True)
class Task:
    """A job of a study, and the event that its result becomes."""

    job: Job
    event: Callable[[Measurement], dict[str, Any]]

    @property
    def key(self) -> str:
        return self.job.key


class Shown(Counter, Protocol):
    """Where a run says how far it is: a `Line`, or a bar of tqdm."""

    def write(self, text: str, /) -> object: ...


class Study:
    """Runs trials through an executor and writes every result down before anyone sees it.

    What is in the journal stays there: here are its places, and the scores.

    Args:
        folder: of the run; checkpoints go into its `trials` folder.
        journal: open for writing.
        executor: where trials run.
        bar: counts tokens trained.
        on_event: is told of every event once it is written down.

    Attributes:
        scores: of every trial in the journal, by id; None if it failed.
        reasons: why trials failed, in a few words, as long as none has succeeded.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        executor: Executor,
        bar: Shown,
        on_event: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self.checkpoints = folder / "trials"
        try:
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise StudyError(f"{self.checkpoints}: cannot be made: {error.strerror}") from error
        self.journal, self.executor, self.bar = journal, executor, bar
        self.on_event = on_event
        self.places: dict[tuple[str, ...], dict[tuple[Any, ...], int]] = {}
        self.grown: dict[str, Any] = {}  # what an extended search has more of
        self.grown_at = 0
        self.scores: dict[str, float | None] = {}
        self.own: set[str] = set()  # trainings of this very run
        self.succeeded, self.reasons = False, set[str]()
        self.earlier: dict[str, int] = {}  # places of what earlier runs found, by id of a trial
        for place, event in journal.scan():
            self._note(place, event)
        self.tasks: dict[str, Task] = {}
        self.arrived: deque[tuple[str, dict[str, Any]]] = deque()

    def clear(self) -> None:
        """Forget every event of a search that was refused before it trained anything."""
        assert not self.scores, "only a run without a trial is forgotten"
        self.journal.clear()
        self.places.clear()

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every event, read from the journal, as if the search had always been what it is now."""
        return current(self.journal.events)

    def once(self, event: str, make: Callable[[], dict[str, Any]], **match: Any) -> dict[str, Any]:
        """The event of this kind and match from the journal, or a new one, made and appended."""
        known = self.find(event, **match)
        return self.append({"event": event, **match, **make()}) if known is None else known

    def find(self, event: str, **match: Any) -> dict[str, Any] | None:
        """The last event of this kind and match, if the journal has one."""
        place = self._place_of(event, match)
        if place is None or (event == "result" and place < self.grown_at):
            return None
        found = self.journal.at(place)
        if event == "study" and self.grown:
            found = {**found, "config": {**found["config"], **self.grown}}
        return found

    def knows(self, event: str, **match: Any) -> bool:
        """Whether the journal has such an event."""
        return self._place_of(event, match) is not None

    def _place_of(self, event: str, match: Mapping[str, Any]) -> int | None:
        kind = (event, *match)
        if kind not in self.places:  # so that a look-up among many events does not read them all
            self.places[kind] = {}
            for place, old in self.journal.scan(event):
                self._place(kind, place, old)
        return self.places[kind].get(tuple(match.values()))

    def _place(self, kind: tuple[str, ...], place: int, event: dict[str, Any]) -> None:
        self.places[kind][tuple(event.get(key) for key in kind[1:])] = place

    def append(self, event: dict[str, Any]) -> dict[str, Any]:
        place = self.journal.size
        written = self.journal.append(event)
        for kind in self.places:
            if kind[0] == event["event"]:
                self._place(kind, place, written)
        self._note(place, written)
        if self.on_event is not None:
            self.on_event(written)
        return written

    def _note(self, place: int, event: dict[str, Any]) -> None:
        if event["event"] == "extended":
            self.grown, self.grown_at = {**self.grown, **event["config"]}, place
        if event["event"] == EARLIER:
            self.earlier.update((trial["id"], place) for trial in event["trials"])
        if event["event"] != "trial":
            return
        self.scores[event["id"]] = event["score"]
        self.own.add(event["id"].partition("-")[0])
        self.succeeded |= event["score"] is not None
        if self.succeeded:
            self.reasons.clear()
        else:
            self.reasons.add(gist(event["failure"] or "no finite score"))

    def begin(self, session: Mapping[str, Any]) -> None:
        """Write down where the next events come from, if that has changed."""
        last = self.find("session") or {}
        if {key: last.get(key) for key in session} != dict(session):
            self.append({"event": "session", **session})

    def start(self, task: Task) -> None:
        """Hand a task to the executor, unless an earlier run has done it."""
        if task.key in self.earlier:
            self.arrived.append((task.key, self.append(task.event(self._known(task.key)))))
            return
        self.tasks[task.key] = task
        self.executor.submit(task.job)

    def _known(self, trial: str) -> Measurement:
        told = self.journal.at(self.earlier[trial])
        own = next(event for event in told["trials"] if event["id"] == trial)
        return replace(
            Measurement.from_dict(own),
            facts={**(own.get("facts") or {}), "earlier": told["folder"]},
        )

    def next(self) -> tuple[str, dict[str, Any]]:
        """Key and event of the next task that ends; the event is in the journal."""
        return self.arrived.popleft() if self.arrived else self._collect()

    def _collect(self) -> tuple[str, dict[str, Any]]:
        job, measured = self.executor.collect(self.bar)
        event = self.append(self.tasks.pop(job.key).event(measured))
        return job.key, event

    def all_of(self, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
        """Run tasks beside whatever runs already, whose results wait for `next`."""
        for task in tasks:
            self.start(task)
        found: dict[str, dict[str, Any]] = {}
        keys = {task.key for task in tasks}
        for key, event in [arrived for arrived in self.arrived if arrived[0] in keys]:
            self.arrived.remove((key, event))
            found[key] = event
        while len(found) < len(tasks):
            key, event = self._collect()
            if key in keys:
                found[key] = event
            else:
                self.arrived.append((key, event))
        return found

    def run(self, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
        """Results of all trials by id: from the journal where they are there, else by running."""
        todo = {t.id: t for t in trials if t.id not in self.scores}
        longest_first = sorted(todo.values(), key=lambda t: -t.tokens)
        found = self.all_of([self.task(t) for t in longest_first])
        return {t.id: found.get(t.id) or self.result(t.id) for t in trials}

    def result(self, trial: str) -> dict[str, Any]:
        """The event of a trial that the journal has, by its id."""
        found = self.find("trial", id=trial)
        assert found is not None, "it is in the journal"
        return found

    def task(self, trial: Trial) -> Task:
        """A trial as what can be started."""
        return Task(self.job(trial), lambda measured: _trial_event(trial, measured))

    def job(self, trial: Trial) -> Job:
        """What an executor is asked to run."""
        self.own.add(trial.run_id)
        return Job(
            trial.entry.spec,
            trial.tokens,
            trial.seed,
            trial.settings,
            trial.horizon,
            self.checkpoint(trial),
            split=trial.split,
            key=trial.id,
        )

    def checkpoint(self, trial: Trial) -> Path:
        return self.checkpoints / f"{trial.run_id}.pt"

    def has(self, trials: Sequence[Trial]) -> bool:
        """Whether the journal holds all their results."""
        return all(trial.id in self.scores for trial in trials)

    def keep(self, trials: Sequence[Trial], busy: Collection[Path | None] = ()) -> None:
        """Delete all checkpoints of this run but those of these trials, and those in use; strange
        files stay."""
        kept = {trial.run_id for trial in trials} | {path.stem for path in busy if path}
        for path in self.checkpoints.glob("*.pt"):
            if path.stem in self.own and path.stem not in kept:
                remove(path)

    def forget(self, trials: Sequence[Trial]) -> None:
        """Delete checkpoints that no later rung can need."""
        for trial in trials:
            if trial.run_id in self.own:
                remove(self.checkpoint(trial))


def _trial_event(trial: Trial, measured: Measurement) -> dict[str, Any]:
    return {
        "event": "trial",
        "id": trial.id,
        "candidate": trial.entry.id,
        "rung": trial.rung,
        "seed": trial.seed,
        "settings": dict(trial.settings),
        **measured.to_dict(),
    }


def falling_score(score: float | None, metric: Metric) -> float:
    """sign * score of a trial, which always falls; a failed trial is above every other."""
    return float("inf") if score is None else metric.sign * score


def remove(path: Path) -> None:
    """Delete what an evaluator left: a file, a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
