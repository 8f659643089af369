"""`PipelineSpace`: whatever typed moves reach from a few models; serves every searcher.

Glossary
    move      one typed change of a model; see `moves` and `fields`
    macro     a few moves in a row, made as one
    variant   a model, with the move and the parents that made it
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec, Signal, Tokens
from kizzasi.nas.pipelines.pipeline import Pipeline
from kizzasi.nas.pipelines.space.genes import distance
from kizzasi.nas.pipelines.space.moves import MOVES
from kizzasi.nas.pipelines.space.tree import RefusedError, joined, runs
from kizzasi.nas.spaces.model_space import name_of
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.stem import with_stem
from kizzasi.strict import require

TRIES = 24  # of a move that does not fit
CHANCES = 64  # different outcomes of a move that are listed
DEPTH = 3  # moves between a seed and what `sample` and `build` make of it
BEYOND_COUNTING = 2**62


@dataclass(frozen=True)
class Variant:
    """A model of the space. Those of equal specs are equal and hash alike.

    Args:
        spec: the model.
        moves: what made it of its parents, in order; () for a seed.
        parents: the models that it was made from.
    """

    spec: ModelSpec
    moves: tuple[str, ...] = field(default=(), compare=False)
    parents: tuple[ModelSpec, ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        return name_of(self.spec)

    def to_spec(self, *, stem: Tokens | Signal | None = None) -> ModelSpec:
        """The model. Raises SpecError where its stem is another one than `stem`."""
        return with_stem(self.spec, stem)


@dataclass(frozen=True)
class PipelineSpace:
    """The models that moves reach from the seeds; implements `Space[Variant]`.

    Every member passes `ModelSpec.check`, is causal as long as the seeds are, and keeps the stem.
    A move that does not fit is drawn again, `TRIES` times at most; then the child is its parent,
    and `child` says why.

    Args:
        seeds: models to begin with, at least one: of pipelines, presets or checkpoints. All take
            the stem of the first, if no other is given.
        stem: of every model.
        max_layers: no member has more.
        max_width: no member is wider; None allows four times the widest seed.

    Raises:
        SpecError: there is no seed, or one breaks a rule with this stem.
    """

    seeds: tuple[ModelSpec, ...]
    stem: Tokens | Signal | None = None
    max_layers: int = 32
    max_width: int | None = None

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "seeds", "empty; give at least one model")
        stem = self.seeds[0].stem if self.stem is None else self.stem
        tied = isinstance(stem, Tokens)
        seeds = [s.replace(stem=stem, tie_head=s.tie_head and tied) for s in self.seeds]
        for i, seed in enumerate(seeds):
            try:
                seed.check()
            except SpecError as error:
                raise SpecError(f"seeds[{i}]: {error}") from error
        width = self.max_width or 4 * max(seed.d_model for seed in seeds)
        for name, value in (("seeds", tuple(seeds)), ("stem", stem), ("max_width", width)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_files(
        cls, paths: Sequence[str | os.PathLike[str]], stem: Tokens | Signal | None = None
    ) -> PipelineSpace:
        """Of YAML pipelines. Raises SpecError naming a file, and what does not fit in it."""
        return cls(tuple(Pipeline.from_file(path).spec for path in paths), stem)

    @property
    def size(self) -> int:
        """Beyond counting: moves can always be made."""
        return BEYOND_COUNTING

    def sample(self, rng: Xorshift64) -> Variant:
        """A seed after up to three moves."""
        variant = Variant(rng.choice(self.seeds))
        for _ in range(rng.choice(range(DEPTH + 1))):
            variant = self.moved(variant, rng)
        return Variant(variant.spec, variant.moves)

    def build(self, decide: Callable[[str, int], int]) -> Variant:
        """A seed after up to three moves, each with its chance decided on too."""
        names = list(MOVES)
        variant = Variant(self.seeds[decide("seed", len(self.seeds))])
        for i in range(decide("moves", DEPTH + 1)):
            name = names[decide(f"move {i}", len(names))]
            chance = Xorshift64(1 + decide(f"chance {i}", CHANCES))
            variant = self.moved(variant, chance, name)
        return Variant(variant.spec, variant.moves)

    def mutate(self, candidate: Variant, rng: Xorshift64, prob: float) -> Variant:
        """With probability `prob` for each layer, and once for the stream, one move."""
        variant = Variant(candidate.spec)
        for _ in range(1 + len(candidate.spec.blocks)):
            if rng.next_f64() < prob:
                variant = self.moved(variant, rng)
        return Variant(variant.spec, variant.moves, (candidate.spec,))

    def macro(self, candidate: Variant, rng: Xorshift64) -> Variant:
        """Two to four moves as one."""
        variant = Variant(candidate.spec)
        for _ in range(rng.choice((2, 3, 4))):
            variant = self.moved(variant, rng)
        return Variant(variant.spec, variant.moves, (candidate.spec,))

    def moved(self, candidate: Variant, rng: Xorshift64, move: str | None = None) -> Variant:
        """`child`, or the candidate itself where that is refused."""
        try:
            return self.child(candidate, rng, move)
        except RefusedError:
            return candidate

    def child(self, candidate: Variant, rng: Xorshift64, move: str | None = None) -> Variant:
        """The candidate after one move that changes it.

        Args:
            candidate: of this space.
            rng: all chance.
            move: its name; None draws one for every try.

        Raises:
            RefusedError: `TRIES` tries gave nothing valid; the message names the last reason.
        """
        reason = ""
        for _ in range(TRIES):
            name = rng.choice(list(MOVES)) if move is None else move
            try:
                spec = MOVES[name](candidate.spec, rng)
                self._admit(spec)
            except SpecError as error:
                reason = f"{name}: {error}"
                continue
            if spec != candidate.spec:
                parents = candidate.parents or (candidate.spec,)
                return Variant(spec, (*candidate.moves, name), parents)
            reason = f"{name}: it changes nothing"
        raise RefusedError(f"{TRIES} tries gave no other model; the last: {reason}")

    def crossover(self, a: Variant, b: Variant, rng: Xorshift64) -> Variant:
        """Each module from `a` or `b`, one fair coin for each, and the stream likewise; modules
        that only the longer parent has come from it, if its length is drawn.

        If no mixture fits, the child is `a`.
        """
        mine, theirs = runs(a.spec), runs(b.spec)
        for _ in range(TRIES):
            n = rng.choice((len(mine), len(theirs)))
            chosen = [
                rng.choice([part for part in (mine, theirs) if i < len(part)])[i] for i in range(n)
            ]
            around = rng.choice((a.spec, b.spec))
            try:
                spec = joined(around, chosen)
                self._admit(spec)
            except SpecError:
                continue
            return Variant(spec, ("crossover",), (a.spec, b.spec))
        return a

    def immigrant(self, rng: Xorshift64) -> Variant:
        """A seed, moved once, that comes into a population from outside."""
        moved = self.moved(Variant(rng.choice(self.seeds)), rng)
        return Variant(moved.spec, ("immigrant", *moved.moves))

    def iterate(self, limit: int | None = None) -> Sequence[Variant]:
        """The seeds, then their children, each once and in a fixed order; the first `limit`, or
        all that one move and its first outcomes give."""
        found: dict[Variant, None] = {}
        for variant in self._neighbours():
            if limit is not None and len(found) >= limit:
                break
            found.setdefault(variant)
        return list(islice(found, limit))

    def contains(self, candidate: object) -> bool:
        """Say whether this is a valid model within the bounds of the space."""
        if not isinstance(candidate, Variant):
            return False
        try:
            self._admit(candidate.spec)
        except SpecError:
            return False
        return True

    def novelty(self, candidate: Variant, others: Sequence[Variant], nearest: int = 3) -> float:
        """Mean distance of normalised genes to the nearest others; 1 where there are none."""
        gaps = sorted(distance(candidate.spec, other.spec) for other in others)[:nearest]
        return sum(gaps) / len(gaps) if gaps else 1.0

    def _neighbours(self) -> Iterator[Variant]:
        yield from map(Variant, self.seeds)
        for seed in self.seeds:
            for name in MOVES:
                for chance in range(1, CHANCES + 1):
                    yield self.moved(Variant(seed), Xorshift64(chance), name)

    def _admit(self, spec: ModelSpec) -> None:
        """Raise SpecError unless the model is a member."""
        assert self.max_width is not None, "set when made"
        n, most = len(spec.blocks), self.max_layers
        require(n <= most, "blocks", f"{n} layers are more than the space's {most}")
        rule = f"{spec.d_model} is wider than the space's {self.max_width}"
        require(spec.d_model <= self.max_width, "d_model", rule)
        require(spec.stem == self.stem, "stem", f"{spec.stem} is not the space's {self.stem}")
        spec.check()
        causal = spec.causal or not all(seed.causal for seed in self.seeds)
        require(causal, "blocks", "outputs would depend on later inputs")
