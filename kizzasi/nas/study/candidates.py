"""Who takes part in a search: baselines, a pool ranked by proxy, or what a searcher proposes.

Glossary
    entry      a candidate with its model, as it stands in the journal
    group      "preset" (a baseline), "proxy", "random", "outside" (the band), or "searched": made
               from others
    genotype   the genes that made a candidate, as plain data of its space
    parents    ids of the entries whose genes it mixes or changes
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.searchers import Flowing, News, Proposals, Searcher, Stream, Streaming
from kizzasi.nas.searchers.traced import Traced
from kizzasi.nas.spaces.constraints import Constraints, Refusal, Rules
from kizzasi.nas.spaces.describe import cost_at, describe, spec_of
from kizzasi.nas.spaces.families import ArchCandidate
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.spaces.stem import Stem
from kizzasi.nas.study.study import Entry, Study

STATE_LENGTH = 1024  # tokens at which state sizes are compared


def entry_of(group: str, candidate: Any, stem: Stem | None, parents: tuple[str, ...] = ()) -> Entry:
    """A candidate of a space as an entry."""
    told = describe(candidate, stem)
    plain = plain_entry(group, told.name, told.family, told.spec)
    if told.settings is not None:
        text = f"{told.spec.digest} {json.dumps(told.settings, sort_keys=True)}"
        ident = hashlib.sha256(text.encode()).hexdigest()[:12]
        plain = dataclasses.replace(plain, id=ident, settings=told.settings)
    return dataclasses.replace(
        plain,
        proxy=told.proxy,
        estimated_params=told.estimated_params,
        genotype=told.genotype,
        parents=parents,
    )


def plain_entry(group: str, name: str, family: str, spec: ModelSpec) -> Entry:
    """A model as an entry."""
    cost = cost_at(spec, STATE_LENGTH)
    ident = spec.digest[:12]
    return Entry(ident, group, name, family, spec, None, cost.params, None, cost.state_bytes)


def baseline_entries(baselines: Mapping[str, ModelSpec], rules: Rules) -> list[Entry]:
    """Those that the winner has to beat; one that breaks another bound than that on parameters is
    no fair comparison and stays out. Each has learning rates of its own."""
    found = []
    for name, spec in baselines.items():
        refusal = rules.refusal(spec)
        if refusal is None or refusal.rule == "params":
            found.append(plain_entry("preset", name, name.removesuffix(" preset"), spec))
    return found


@dataclass(frozen=True)
class Recorded:
    """Constraints whose measurements go through the journal, so that no clock is read twice."""

    constraints: Constraints
    study: Study

    def check(self) -> None:
        self.constraints.check()

    def refusal(self, spec: ModelSpec) -> Refusal | None:
        """The first rule that the spec breaks."""
        if refusal := self.constraints.analytic_refusal(spec):
            return refusal
        if self.constraints.latency_ms is None and self.constraints.peak_memory_bytes is None:
            return None

        def measure() -> dict[str, Any]:
            refusal = self.constraints.refusal(spec)
            return {"refusal": refusal and refusal._asdict()}

        found = self.study.once("measured", measure, id=spec.digest[:12])["refusal"]
        return found and Refusal(**found)


@dataclass(frozen=True)
class ProxyPool:
    """Random candidates of a space of families, of which a formula chooses who is trained.

    In it are the best by the analytic proxy, a random control group, and a few from outside the
    band on parameters, all at once.

    Args:
        n_pool: candidates that the proxy scores.
        n_best, n_random, n_outside: trained, by group.
        seed: 0 .. 2^64 - 1.
    """

    n_pool: int
    n_best: int
    n_random: int
    n_outside: int
    seed: int

    def entries(self, space: Space[Any], rules: Rules, stem: Stem | None) -> Iterator[Entry]:
        """The members of the pool, by group. Raises StudyError if hardly any keeps the rules."""
        rng = Xorshift64(self.seed)
        inside, outside = self._drawn(space, rules, stem, rng)
        if len(inside) < 2:
            raise StudyError(
                f"n_params: {len(inside)} candidates of the space have as many parameters as "
                "allowed and keep all bounds; change --params or widen --band"
            )
        for group, candidate in self._chosen(inside, outside, rng):
            yield entry_of(group, candidate, stem)

    def _chosen(
        self, inside: Sequence[ArchCandidate], outside: Sequence[ArchCandidate], rng: Xorshift64
    ) -> Iterator[tuple[str, ArchCandidate]]:
        ranked = sorted(inside, key=lambda c: -c.proxy_score())
        rest = ranked[self.n_best :]
        rng.shuffle(rest)
        for group, members in (
            ("proxy", ranked[: self.n_best]),
            ("random", rest[: self.n_random]),
            ("outside", outside[: self.n_outside]),
        ):
            yield from ((group, member) for member in members)

    def _drawn(
        self, space: Space[Any], rules: Rules, stem: Stem | None, rng: Xorshift64
    ) -> tuple[list[ArchCandidate], list[ArchCandidate]]:
        """Distinct real candidates that keep the rules, and some whose size is outside the band."""
        inside: dict[str, ArchCandidate] = {}
        outside: dict[str, ArchCandidate] = {}
        for _ in range(max(2000, 20 * self.n_pool)):
            candidate = space.sample(rng)
            try:
                spec = spec_of(candidate, stem)
            except SpecError:
                continue  # genes that do not fit each other
            refusal = rules.refusal(spec)
            if refusal is None:
                inside.setdefault(spec.digest, candidate)
            elif refusal.rule == "params":
                outside.setdefault(spec.digest, candidate)
            if len(inside) == self.n_pool:
                break
        return list(inside.values()), list(outside.values())


@dataclass(frozen=True)
class Given:
    """A searcher that proposes what it was given, at once."""

    entries: Sequence[Entry]

    def proposals(self, space: Any) -> Proposals[Any]:
        yield self.entries


@dataclass(frozen=True)
class EntrySearcher:
    """A searcher of entries around one of candidates: baselines first, and no model twice.

    A candidate whose model has a score already is not proposed again; its searcher gets that score.

    Args:
        searcher: of candidates.
        presets: take part from the beginning.
        stem: of the task.
        objectives: what the searcher minimises beside the loss; None if it wants a plain score.
        first: candidates that it begins with, before it draws.
        own: filled from outside while the search runs; these go before what the searcher draws.
    """

    searcher: Searcher
    presets: Sequence[Entry]
    stem: Stem | None
    objectives: Callable[[ModelSpec], tuple[float, ...]] | None = None
    first: Sequence[Any] = ()
    own: deque[Entry] = field(default_factory=deque)

    def proposals(self, space: Space[Any]) -> Proposals[Any]:
        """Yield the new entries of each batch."""
        traced, ids, scores = Traced(space, self.first), dict[Any, str](), dict[str, float]()
        inner = self.searcher.proposals(traced)
        batch, first = next(inner), self.presets
        while True:
            entries = [self.entered(candidate, traced, ids) for candidate in batch]
            ids.update((c, e.id) for c, e in zip(batch, entries, strict=True))
            traced.forget()
            new: dict[str, Entry] = {}
            for entry in (*first, *entries):
                if entry.id not in scores:
                    new.setdefault(entry.id, entry)
            first = ()
            if new:
                told = yield list(new.values())
                scores.update(zip(new, told, strict=True))
            try:
                batch = inner.send([self.score(e, scores[e.id]) for e in entries])
            except StopIteration:
                return

    def stream(self, space: Space[Any]) -> Stream[Entry]:
        """Yield the presets, then a new entry at every call."""
        assert isinstance(self.searcher, Streaming), "checked"
        traced = Traced(space, self.first)
        inner = Flowing(self.searcher.stream(traced))
        ledger = _Ledger(self, traced, inner)
        candidate = inner.propose()  # so that a space without candidates is known before a training
        for preset in self.presets:
            ledger.hear((yield ledger.enter(preset)))
        while self.own or candidate is not None or not inner.over:
            if self.own:
                ledger.hear((yield ledger.enter(self.own.popleft())))
                continue
            if candidate is None:
                ledger.hear((yield None))
            elif entry := ledger.new(candidate):
                ledger.hear((yield ledger.enter(entry)))
            candidate = inner.propose()

    def entered(self, candidate: Any, traced: Traced[Any], ids: dict[Any, str]) -> Entry:
        parents = tuple(ids[parent] for parent in traced.parents(candidate, ids))
        group = "random" if traced.sampled(candidate) else "searched"
        return entry_of(group, candidate, self.stem, parents)

    def score(self, entry: Entry, score: float) -> Any:
        return (-score, *self.objectives(entry.spec)) if self.objectives else score


class _Ledger:
    """Between a stream of entries and the searcher's own of candidates: who is who, and which
    results are news to whom.

    Args:
        searcher: whose stream it is.
        traced: the space that the searcher draws from.
        inner: the searcher's stream.
    """

    def __init__(self, searcher: EntrySearcher, traced: Traced[Any], inner: Flowing[Any]) -> None:
        self.searcher, self.traced, self.inner = searcher, traced, inner
        self.ids: dict[Any, str] = {}  # of candidates
        self.entered: list[Entry] = []  # by the outer number
        self.scores: dict[str, float | None] = {}  # of everyone who has entered
        self.numbers: dict[str, list[int]] = {}  # the inner ones of every model
        self.n_inner = 0

    def new(self, candidate: Any) -> Entry | None:
        """A proposal of the searcher as an entry; None if its model has entered before."""
        entry = self.searcher.entered(candidate, self.traced, self.ids)
        self.ids[candidate] = entry.id
        self.traced.forget()
        number, self.n_inner = self.n_inner, self.n_inner + 1
        self.numbers.setdefault(entry.id, []).append(number)
        if entry.id not in self.scores:
            return entry
        score = self.scores[entry.id]
        if score is not None:
            self.inner.tell(number, self.searcher.score(entry, score))
        return None

    def enter(self, entry: Entry) -> Entry:
        """Note that an entry takes part."""
        self.scores.setdefault(entry.id, None)
        self.entered.append(entry)
        return entry

    def hear(self, news: News) -> None:
        """Pass results on to the searcher, for each of its proposals that are of that model."""
        for number, score in news:
            entry = self.entered[number]
            self.scores[entry.id] = score
            for own in self.numbers.get(entry.id, ()):
                self.inner.tell(own, self.searcher.score(entry, score))


def costs(spec: ModelSpec) -> tuple[float, ...]:
    """What a search of several objectives minimises beside the loss: state and flops."""
    cost = cost_at(spec, STATE_LENGTH)
    return float(cost.state_bytes), float(cost.flops)
