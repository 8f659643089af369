"""`Joint`: a space whose candidates bring their own settings of the training, as further genes.

settings    such as lr, weight_decay, batch_size; dropout, if it is among them, is of the model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.spaces.constraints import Resizable
from kizzasi.nas.spaces.describe import Description, describe, spec_of
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Combinations, Space
from kizzasi.nas.spaces.stem import Stem

C = TypeVar("C")
DROPOUT = "dropout"  # a number of the model, not of the training


@dataclass(frozen=True)
class JointCandidate(Generic[C]):
    """A candidate of a space and the settings that it is trained with.

    Args:
        candidate: of the inner space.
        chosen: (name, value) of every further gene.
    """

    candidate: C
    chosen: tuple[tuple[str, Any], ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the training."""
        return {name: value for name, value in self.chosen if name != DROPOUT}

    def to_spec(self, *, stem: Stem | None = None) -> ModelSpec:
        """The model. Raises SpecError as that of the inner candidate does."""
        spec = spec_of(self.candidate, stem)
        own = dict(self.chosen)
        return spec.replace(dropout=own[DROPOUT]) if DROPOUT in own else spec

    def described(self, stem: Stem | None) -> Description:
        told = describe(self.candidate, stem)
        words = (f"{name} {value:g}" for name, value in self.chosen)
        return Description(
            self.to_spec(stem=stem),
            ", ".join((told.name, *words)),
            told.family,
            (*(told.genotype or ()), *self.chosen),
            told.proxy,
            told.estimated_params,
            self.settings,
        )


class Joint(Generic[C]):
    """A space times its further genes; itself a space, for any searcher.

    Args:
        space: of candidates.
        genes: by name, the values of each further gene; at least one, each once.

    Raises:
        SpecError: a gene has no value, or one twice.
    """

    def __init__(self, space: Space[C], genes: Mapping[str, Sequence[Any]]) -> None:
        for name, values in genes.items():
            if not values or len(set(values)) < len(values):
                raise SpecError(f"genes: {name!r} has the values {values}; give some, each once")
        self.space, self.genes = space, {name: tuple(values) for name, values in genes.items()}

    @property
    def size(self) -> int:
        product = self.space.size
        for values in self.genes.values():
            product *= len(values)
        return product

    def sample(self, rng: Xorshift64) -> JointCandidate[C]:
        return self._of(self.space.sample(rng), lambda name: rng.choice(self.genes[name]))

    def build(self, decide: Callable[[str, int], int]) -> JointCandidate[C]:
        def chosen(name: str) -> Any:
            return self.genes[name][decide(name, len(self.genes[name]))]

        return self._of(self.space.build(decide), chosen)

    def mutate(
        self, candidate: JointCandidate[C], rng: Xorshift64, prob: float
    ) -> JointCandidate[C]:
        """Mutate the inner candidate, and redraw every further gene with probability `prob`."""
        own = dict(candidate.chosen)

        def chosen(name: str) -> Any:
            return rng.choice(self.genes[name]) if rng.next_f64() < prob else own[name]

        return self._of(self.space.mutate(candidate.candidate, rng, prob), chosen)

    def crossover(
        self, a: JointCandidate[C], b: JointCandidate[C], rng: Xorshift64
    ) -> JointCandidate[C]:
        """Cross the inner candidates; one fair coin for every further gene."""
        mine, theirs = dict(a.chosen), dict(b.chosen)

        def chosen(name: str) -> Any:
            return rng.choice((mine, theirs))[name]

        return self._of(self.space.crossover(a.candidate, b.candidate, rng), chosen)

    def sizes(
        self, candidate: JointCandidate[C]
    ) -> Sequence[Callable[[], JointCandidate[C] | None]]:
        """The candidate at every size of the inner space, if that knows its sizes."""
        if not isinstance(self.space, Resizable):
            return []

        def at(make: Callable[[], C | None]) -> JointCandidate[C] | None:
            made = make()
            return None if made is None else JointCandidate(made, candidate.chosen)

        return [partial(at, make) for make in self.space.sizes(candidate.candidate)]

    def iterate(self, limit: int | None = None) -> Sequence[JointCandidate[C]]:
        """All of them, the last gene turning fastest, or the first `limit`."""

        def made(candidate: C, *values: Any) -> JointCandidate[C]:
            return JointCandidate(candidate, tuple(zip(self.genes, values, strict=True)))

        axes = (self.space.iterate(limit), *self.genes.values())
        n = len(axes[0])
        for values in self.genes.values():
            n *= len(values)
        return Combinations(made, axes, range(n)[:limit])

    def contains(self, candidate: object) -> bool:
        if not isinstance(candidate, JointCandidate):
            return False
        own = dict(candidate.chosen)
        return (
            list(own) == list(self.genes)
            and all(own[name] in values for name, values in self.genes.items())
            and self.space.contains(candidate.candidate)
        )

    def encode(self, spec: ModelSpec) -> JointCandidate[C] | None:
        """The candidate that is this model, if the inner space has it, with the middle value of
        every further gene."""
        found: Any = self.space.encode(spec) if isinstance(self.space, ModelSpace) else None
        middle = {name: values[len(values) // 2] for name, values in self.genes.items()}
        return None if found is None else self._of(found, middle.__getitem__)

    def _of(self, candidate: C, chosen: Callable[[str], Any]) -> JointCandidate[C]:
        return JointCandidate(candidate, tuple((name, chosen(name)) for name in self.genes))
