"""Who takes part in a search: presets, a pool ranked by proxy, or what a searcher proposes.

Glossary
    entry      a candidate with its model, as it stands in the journal
    group      "preset", "proxy", "random", "outside" (the band), or "searched": made from others
    genotype   the genes that made a candidate, as plain data of its space
    parents    ids of the entries whose genes it mixes or changes
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec, build_model, presets
from kizzasi.nas.evaluators.zero_cost import PROXIES, Batch
from kizzasi.nas.executors.job import EXPLOSIONS
from kizzasi.nas.searchers import Proposals, Searcher
from kizzasi.nas.searchers.traced import Traced
from kizzasi.nas.spaces.constraints import Constraints, Refusal, Rules
from kizzasi.nas.spaces.families import ArchCandidate, ArchSearchSpace
from kizzasi.nas.spaces.model_space import Candidate
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.study import Entry, Study

C = TypeVar("C")

VOCAB = 256
STATE_LENGTH = 1024  # tokens at which state sizes are compared


def entry_of(
    group: str,
    candidate: ArchCandidate | Candidate,
    family: str,
    parents: tuple[str, ...] = (),
) -> Entry:
    """A candidate of a space as an entry."""
    known = isinstance(candidate, ArchCandidate)
    entry = _entry(group, candidate.name, family, candidate.to_spec(vocab_size=VOCAB))
    return dataclasses.replace(
        entry,
        name=entry.name if known else f"{entry.name} {entry.id[:4]}",  # widths are not in a name
        proxy=candidate.proxy_score(),
        estimated_params=candidate.param_count() if known else None,
        genotype=dataclasses.asdict(candidate) if known else candidate.to_dict(),
        parents=parents,
    )


def _entry(group: str, name: str, family: str, spec: ModelSpec) -> Entry:
    cost = spec.cost(STATE_LENGTH)
    ident = spec.digest[:12]
    return Entry(ident, group, name, family, spec, None, cost.params, None, cost.state_bytes)


def main_mixer(candidate: Candidate) -> str:
    """The family of a candidate whose layers differ: "mostly" the mixer that most of them have, and
    of equals the one that comes first. Its members share a learning rate."""
    spec = candidate.to_spec(vocab_size=VOCAB)
    kinds = Counter(block.mixer.kind for block in spec.blocks)
    return f"mostly {kinds.most_common(1)[0][0]}"


def preset_entries(config: SearchConfig, families: Collection[str], rules: Rules) -> list[Entry]:
    """The usual proportions at the same budget; those that break another bound than the band on
    parameters are no fair comparison and stay out."""
    found = []
    for family in families:
        spec = presets.at_size(family, config.n_params, vocab_size=VOCAB)
        refusal = rules.refusal(spec)
        if refusal is None or refusal.rule == "params":
            found.append(_entry("preset", f"{family} preset", family, spec))
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


def pool(config: SearchConfig, space: ArchSearchSpace, rules: Rules, seed: int) -> Iterator[Entry]:
    """The best by proxy, the random control group, and a few outside the band."""
    rng = Xorshift64(seed)
    inside, outside = _pool(config, space, rules, rng)
    ranked = sorted(inside, key=lambda c: -c.proxy_score())
    rest = ranked[config.n_best :]
    rng.shuffle(rest)
    for group, members in (
        ("proxy", ranked[: config.n_best]),
        ("random", rest[: config.n_random]),
        ("outside", outside[: config.n_outside]),
    ):
        for candidate in members:
            yield entry_of(group, candidate, candidate.model_type)


def _pool(
    config: SearchConfig, space: ArchSearchSpace, rules: Rules, rng: Xorshift64
) -> tuple[list[ArchCandidate], list[ArchCandidate]]:
    """Distinct real candidates that keep the rules, and some whose size is outside the band."""
    inside: dict[str, ArchCandidate] = {}
    outside: dict[str, ArchCandidate] = {}
    for _ in range(max(2000, 20 * config.n_pool)):
        candidate = space.sample(rng)
        try:
            spec = candidate.to_spec(vocab_size=VOCAB)
        except SpecError:
            continue  # genes that do not fit each other
        refusal = rules.refusal(spec)
        if refusal is None:
            inside.setdefault(spec.digest, candidate)
        elif refusal.rule == "params":
            outside.setdefault(spec.digest, candidate)
        if len(inside) == config.n_pool:
            break
    if len(inside) < 2:
        low, high = (config.n_params * (1 + sign * config.band) for sign in (-1, 1))
        raise StudyError(
            f"n_params: {len(inside)} candidates have {low:.0f} to {high:.0f} parameters and keep "
            "all bounds; change --params or widen --band"
        )
    return list(inside.values()), list(outside.values())


@dataclass(frozen=True)
class Given:
    """A searcher that proposes what it was given, at once."""

    entries: Sequence[Entry]

    def proposals(self, space: Any) -> Proposals[Any]:
        yield self.entries


@dataclass(frozen=True)
class Entrants:
    """A searcher of entries around one of candidates: presets first, and no model twice.

    A candidate whose model has a score already is not proposed again; its searcher gets that score.

    Args:
        searcher: of candidates.
        presets: take part from the beginning.
        family: of a candidate; its members share a learning rate.
        objectives: what the searcher minimises beside the loss; None if it wants a plain score.
        first: candidates that it begins with, before it draws.
    """

    searcher: Searcher
    presets: Sequence[Entry]
    family: Callable[[Any], str]
    objectives: Callable[[ModelSpec], tuple[float, ...]] | None = None
    first: Sequence[Any] = ()

    def proposals(self, space: Space[Any]) -> Proposals[Any]:
        """Yield the new entries of each batch."""
        traced, ids, scores = Traced(space, self.first), dict[Any, str](), dict[str, float]()
        inner = self.searcher.proposals(traced)
        batch, first = next(inner), self.presets
        while True:
            entries = [self._entered(candidate, traced, ids) for candidate in batch]
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
                batch = inner.send([self._score(e, scores[e.id]) for e in entries])
            except StopIteration:
                return

    def _entered(self, candidate: Any, traced: Traced[Any], ids: dict[Any, str]) -> Entry:
        parents = tuple(ids[parent] for parent in traced.parents(candidate, ids))
        group = "random" if traced.sampled(candidate) else "searched"
        return entry_of(group, candidate, self.family(candidate), parents)

    def _score(self, entry: Entry, score: float) -> Any:
        return (-score, *self.objectives(entry.spec)) if self.objectives else score


def zero_cost(spec: ModelSpec, names: Sequence[str], batch: Batch, seed: int) -> dict[str, Any]:
    """Scores without training, by name; null where a proxy failed, with its reason."""
    scores: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    model = None
    for name in names:
        try:
            model = build_model(spec, seed=seed) if model is None else model
            scores[name] = PROXIES[name](model, batch)
        except EXPLOSIONS as error:
            scores[name], failures[name] = None, repr(error)
    return {"proxies": scores, **({"proxy_failures": failures} if failures else {})}


def costs(spec: ModelSpec) -> tuple[float, ...]:
    """What a search of several objectives minimises beside the loss: state and flops."""
    cost = spec.cost(STATE_LENGTH)
    return float(cost.state_bytes), float(cost.flops)
