"""A study: trials meet the journal. What is in the journal is never run again.

Events of a run, one JSON object per line of journal.jsonl:

study      config, corpus {name, digest, n_bytes, n_held_out, repeated}, baselines {name: bits/byte}
measured   id, refusal (null, or the bound that this model breaks when it is run)
screen     see `kizzasi.nas.study.screens`
candidate  id, group ("preset", "proxy", "random", "searched" or "outside" the band), name, family,
           spec, proxy, params, estimated_params, state_bytes, genotype, parents (candidate ids),
           proxies {name: value or null}, proxy_failures {name: reason} if there are any
lr         family, candidate, scores {lr: bits/byte or null}, lr; a mean over candidates where
           several share a sweep
trial      id, candidate, rung ("0", "1", ..., "final" or "narrow"), seed, lr, tokens,
           bits_per_byte, seconds, tokens_per_second, curve, failure
result     winner, preset (candidate ids), winner_trials, preset_trials (trial ids), ranking
           (candidate ids, best first), finalists [{candidate, mean, spread, trials}], noise {floor,
           seeds, freedom} or null, ties (candidate ids that noise does not tell from the winner),
           tokens (trained on rungs), refused {rule: candidates never built}; and what
           `kizzasi.nas.study.final_training` lists, with the event "narrow"
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.micro_training import Measurement
from kizzasi.nas.executors import Executor, Job
from kizzasi.nas.study.journal import Journal


@dataclass(frozen=True)
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
    genotype: dict[str, Any] | None = None
    parents: tuple[str, ...] = ()

    def to_event(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"event": "candidate", **own, "spec": self.spec.to_dict()}


@dataclass(frozen=True)
class Trial:
    """One training of an entry, up to a rung."""

    entry: Entry
    rung: str
    seed: int
    lr: float
    tokens: int
    horizon: int

    @property
    def run_id(self) -> str:
        """Names the training across its rungs; its checkpoint has this name."""
        text = f"{self.entry.spec.digest} {self.seed} {self.lr!r} {self.horizon}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        return f"{self.run_id}-{self.tokens}"


class Study:
    """Runs trials through an executor and writes every result down before anyone sees it.

    Args:
        folder: of the run; checkpoints go into its `trials` folder.
        journal: open for writing.
        executor: where trials run.
        bar: counts tokens trained.
    """

    def __init__(self, folder: Path, journal: Journal, executor: Executor, bar: tqdm) -> None:
        self.checkpoints = folder / "trials"
        self.checkpoints.mkdir(exist_ok=True)
        self.journal, self.executor, self.bar = journal, executor, bar
        self.events: list[dict[str, Any]] = list(journal.events)
        self.places: dict[tuple[str, ...], dict[tuple[Any, ...], dict[str, Any]]] = {}
        self.done = {e["id"]: e for e in self.events if e["event"] == "trial"}

    def once(self, event: str, make: Callable[[], dict[str, Any]], **match: Any) -> dict[str, Any]:
        """The event of this kind and match from the journal, or a new one, made and appended."""
        kind = (event, *match)
        if kind not in self.places:  # so that a look-up among many events does not read them all
            self.places[kind] = {}
            for old in reversed(self.events):
                self._place(kind, old)
        if known := self.places[kind].get(tuple(match.values())):
            return known
        return self.append({"event": event, **match, **make()})

    def _place(self, kind: tuple[str, ...], event: dict[str, Any]) -> None:
        name, *keys = kind
        if event["event"] == name:
            self.places[kind][tuple(event.get(key) for key in keys)] = event

    def append(self, event: dict[str, Any]) -> dict[str, Any]:
        written = self.journal.append(event)
        self.events.append(written)
        for kind in self.places:
            self._place(kind, written)
        return written

    def run(self, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
        """Results of all trials by id: from the journal where they are there, else by running."""
        todo = {t.id: t for t in trials if t.id not in self.done}
        jobs = [
            Job(t.id, t.entry.spec, t.tokens, t.seed, t.lr, t.horizon, self.checkpoint(t))
            for t in sorted(todo.values(), key=lambda t: -t.tokens)  # the longest are not last
        ]
        for job, measured in self.executor.run(jobs, self.bar) if jobs else ():
            self.done[job.key] = self.append(_trial_event(todo[job.key], measured))
        return {t.id: self.done[t.id] for t in trials}

    def checkpoint(self, trial: Trial) -> Path:
        return self.checkpoints / f"{trial.run_id}.pt"

    def has(self, trials: Sequence[Trial]) -> bool:
        """Whether the journal holds all their results."""
        return all(trial.id in self.done for trial in trials)

    def keep(self, trials: Sequence[Trial]) -> None:
        """Delete all checkpoints but those of these trials."""
        kept = {self.checkpoint(trial) for trial in trials}
        for path in self.checkpoints.glob("*.pt"):
            if path not in kept:
                path.unlink()

    def forget(self, trials: Sequence[Trial]) -> None:
        """Delete checkpoints that no later rung can need."""
        for trial in trials:
            self.checkpoint(trial).unlink(missing_ok=True)


def _trial_event(trial: Trial, measured: Measurement) -> dict[str, Any]:
    return {
        "event": "trial",
        "id": trial.id,
        "candidate": trial.entry.id,
        "rung": trial.rung,
        "seed": trial.seed,
        "lr": trial.lr,
        **measured.to_dict(),
    }


def score_of(event: dict[str, Any]) -> float:
    """Bits per byte of a trial event; a failed trial is worse than every other."""
    score = event["bits_per_byte"]
    return float("inf") if score is None else score
