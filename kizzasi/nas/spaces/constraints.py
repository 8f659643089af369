"""Hard constraints, checked before training: what breaks a rule is refused with its reason.

Rules that follow from the spec come first and build nothing; only what passes them is built and
measured on this device.

L = seq_len: the length at which state, flops, latency and memory are taken, at batch 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.spaces.describe import cost_at, spec_of
from kizzasi.nas.spaces.device_cost import built, latency_ms, peak_memory_bytes
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.spaces.stem import Stem
from kizzasi.strict import require

Bound: TypeAlias = "float | tuple[float | None, float | None] | None"
ANALYTIC = ("params", "active_params", "flops_per_token", "state_bytes")
MEASURED = ("latency_ms", "peak_memory_bytes")
TRIES = 200  # draws of a feasible candidate before a move gives up
PATIENCE = 20  # times as many, before the first is found
ENOUGH = 4_000  # different candidates refused, none admitted: as good as all of them


class Refusal(NamedTuple):
    """The rule that a spec breaks, its value and the bounds, None for an open one."""

    rule: str
    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        low = "any" if self.low is None else f"{self.low:,g}"
        high = "any" if self.high is None else f"{self.high:,g}"
        return f"{self.rule}: {self.value:,g} is outside {low} .. {high}"


@dataclass(frozen=True)
class Constraints:
    """Bounds that a model has to keep: a number is an upper bound, a pair is (low, high).

    Args:
        params: parameters, shared ones once.
        active_params: parameters that one token uses.
        flops_per_token: of a parallel pass over L tokens, by L; a multiply-add is 2.
        state_bytes: of the state after L tokens, caches of keys and values included.
        latency_ms: measured: median of a parallel pass over (1, L), without gradients.
        peak_memory_bytes: measured: the most that tensors take in that pass, weights included.
        seq_len: L, at least 1.
        device: where latency and memory are measured.
        repeats: passes of which the median is taken, after two to warm up.
    """

    params: Bound = None
    active_params: Bound = None
    flops_per_token: Bound = None
    state_bytes: Bound = None
    latency_ms: Bound = None
    peak_memory_bytes: Bound = None
    seq_len: int = 1024
    device: str = "cpu"
    repeats: int = 5

    def check(self) -> None:
        """Raises SpecError naming the value and the rule."""
        for name in ("seq_len", "repeats"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)}; give at least 1")
        for name in (*ANALYTIC, *MEASURED):
            low, high = self._bounds(name)
            above = low is None or high is None or low <= high
            require(above, name, f"({low}, {high}): low is above high; swap them")

    def analytic_refusal(self, spec: ModelSpec) -> Refusal | None:
        """The first rule that the spec breaks on paper; nothing is built."""
        cost = cost_at(spec, self.seq_len)
        values = (
            cost.params,
            cost.active_params,
            cost.flops / self.seq_len,
            cost.state_bytes,
        )
        broken = map(self._broken, ANALYTIC, values)
        return next((refusal for refusal in broken if refusal), None)

    def refusal(self, spec: ModelSpec) -> Refusal | None:
        """The first rule that the spec breaks; it is built only if it keeps the analytic ones."""
        if refusal := self.analytic_refusal(spec):
            return refusal
        if all(self._bounds(name) == (None, None) for name in MEASURED):
            return None
        model, inputs = built(spec, self.seq_len, torch.device(self.device))
        measures: dict[str, Callable[[], float]] = {
            "latency_ms": lambda: latency_ms(model, inputs, self.repeats),
            "peak_memory_bytes": lambda: peak_memory_bytes(model, inputs),
        }
        for name, measure in measures.items():
            if self._bounds(name) != (None, None) and (broken := self._broken(name, measure())):
                return broken
        return None

    def _bounds(self, name: str) -> tuple[float | None, float | None]:
        bound: Bound = getattr(self, name)
        return bound if isinstance(bound, tuple) else (None, bound)

    def _broken(self, name: str, value: float) -> Refusal | None:
        low, high = self._bounds(name)
        inside = (low is None or value >= low) and (high is None or value <= high)
        return None if inside else Refusal(name, value, low, high)


class Rules(Protocol):
    """What `Feasible` asks of constraints."""

    def check(self) -> None: ...

    def refusal(self, spec: ModelSpec) -> Refusal | None: ...


C = TypeVar("C")


@runtime_checkable
class Resizable(Protocol[C]):
    """A space that knows a candidate's sizes: what else is equal."""

    def sizes(self, candidate: C) -> Sequence[Callable[[], C | None]]:
        """What makes the candidate at each size of the space, small first; None where its parts do
        not fit."""
        ...


class Feasible(Generic[C]):
    """The part of a space that keeps the constraints; itself a space, for any searcher.

    A draw that breaks the bounds on parameters is repaired, where the space knows its sizes: the
    same layers at a width that keeps them, found by halving. Moves are repeated until their result
    is feasible. Every candidate is judged once; candidates must be hashable. With measured rules
    the moves depend on this device and its load, and a replayed search may ask for other
    candidates.

    Args:
        space: of candidates.
        constraints: what they have to keep.
        stem: of the models, where the candidates name none.

    Attributes:
        admitted: how many different candidates were feasible.
        refused: by rule, how many different candidates broke it; "invalid" ones are no models.
    """

    def __init__(self, space: Space[C], constraints: Rules, *, stem: Stem | None = None) -> None:
        constraints.check()
        self.space, self.constraints, self.stem = space, constraints, stem
        self.refused: Counter[str] = Counter()
        self._judged: dict[C, bool] = {}
        self._missed: dict[C, int] = {}
        self._beyond = 0  # sizes that are refused unseen: one nearer to the bounds was

    @property
    def admitted(self) -> int:
        return sum(self._judged.values())

    def admits(self, candidate: C) -> bool:
        """Say whether the candidate keeps every rule."""
        if candidate not in self._judged:
            try:
                broken = self.constraints.refusal(spec_of(candidate, self.stem))
                rule = broken and broken.rule
                if broken and rule == "params":
                    over = broken.high is not None and broken.value > broken.high
                    self._missed[candidate] = 1 if over else -1
            except SpecError:
                rule = "invalid"
            self._judged[candidate] = rule is None
            if rule is not None:
                self.refused[rule] += 1
        return self._judged[candidate]

    def repaired(self, candidate: C) -> C | None:
        """The candidate, or itself at another size, if that keeps every rule."""
        if self.admits(candidate):
            return candidate
        if not self._misses_size(candidate) or not isinstance(self.space, Resizable):
            return None
        sizes = list(self.space.sizes(candidate))
        beyond, seen = len(sizes), {candidate}
        while sizes:  # parameters rise with the size
            middle = len(sizes) // 2
            made = sizes[middle]()
            if made is None:
                del sizes[middle]
                beyond -= 1
                continue
            seen.add(made)
            if self.admits(made):
                return made
            over = self._misses_size(made)
            if not over:
                return None
            sizes = sizes[:middle] if over > 0 else sizes[middle + 1 :]
        self._beyond += beyond - len(seen) if beyond else 0
        return None

    def _misses_size(self, candidate: C) -> int:
        """1 for too many parameters, -1 for too few; 0 where another rule is broken."""
        return self._missed.get(candidate, 0)

    def report(self) -> str:
        """How many candidates were admitted, and how many refused by each rule."""
        refused = ", ".join(f"{rule} {n}" for rule, n in self.refused.most_common()) or "none"
        return f"{self.admitted} admitted; refused by rule: {refused}"

    @property
    def size(self) -> int:
        """Counted by judging every member of the space."""
        return len(self.iterate())

    def sample(self, rng: Xorshift64) -> C:
        """Draw until a candidate is feasible.

        After 200 draws in vain, one that was admitted before; while there is none, SpecError after
        4,000 draws or different candidates, those included whose size is beyond a refused one's,
        or at once if the space has no more and none fits.
        """
        for _ in range(PATIENCE):
            for _ in range(TRIES):
                fit = self.repaired(self.space.sample(rng))
                if fit is not None:
                    return fit
            small = not self.admitted and self.space.size <= ENOUGH
            if small:
                self.iterate()  # which judges all there are
            if known := [candidate for candidate, fit in self._judged.items() if fit]:
                return rng.choice(known)
            if small or len(self._judged) + self._beyond >= ENOUGH:
                break
        beyond = f", and {self._beyond:,} of their other sizes with them" if self._beyond else ""
        raise SpecError(
            f"constraints: none of {len(self._judged):,} candidates keeps them ({self.report()})"
            f"{beyond}; widen the bounds or change the space"
        )

    def build(self, decide: Callable[[str, int], int]) -> C:
        """Make a candidate from decisions; SpecError if it breaks a rule."""
        candidate = self.space.build(decide)
        if not self.admits(candidate):
            raise SpecError(f"constraints: {candidate!r:.80} breaks one; decide otherwise")
        return candidate

    def mutate(self, candidate: C, rng: Xorshift64, prob: float) -> C:
        """Mutate until the child is feasible; the candidate itself if none of 200 is."""
        return self._first(lambda: self.space.mutate(candidate, rng, prob), candidate)

    def crossover(self, a: C, b: C, rng: Xorshift64) -> C:
        """Cross until the child is feasible; `a` if none of 200 is."""
        return self._first(lambda: self.space.crossover(a, b, rng), a)

    def iterate(self, limit: int | None = None) -> Sequence[C]:
        """All feasible members in the space's order, or the first `limit` of them."""
        n = limit
        while True:
            members = self.space.iterate(n)
            found = [member for member in members if self.admits(member)][:limit]
            if limit is None or n is None or len(found) == limit or len(members) < n:
                return found
            n *= 4

    def contains(self, candidate: C) -> bool:
        """Say whether the candidate is a member of the space and feasible."""
        return self.space.contains(candidate) and self.admits(candidate)

    def _first(self, draw: Callable[[], C], otherwise: C) -> C:
        draws = (self.repaired(draw()) for _ in range(TRIES))
        return next((fit for fit in draws if fit is not None), otherwise)
