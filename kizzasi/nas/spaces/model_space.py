"""`ModelSpace`: a search space that is a model spec with holes, so that every layer may differ.

gene, path of a gene: see `kizzasi.nas.spaces.template.parse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from kizzasi.documents import read_document
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, LayerSpec, ModelSpec, Signal, Tokens
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.stem import with_stem
from kizzasi.nas.spaces.template.encode import genes_of
from kizzasi.nas.spaces.template.nodes import (
    TRIES,
    Decide,
    MisfitError,
    Walk,
    every,
    shared,
    widths,
)
from kizzasi.nas.spaces.template.parse import parse, plain
from kizzasi.strict import coerce, require


def name_of(spec: ModelSpec) -> str:
    """Width and layers, equal ones together."""
    return f"d{spec.d_model} {_names(spec.blocks)}"


def _names(layers: Iterable[LayerSpec]) -> str:
    runs = [(name, len(list(run))) for name, run in groupby(map(_name, layers))]
    return " ".join(f"{n}x{name}" if n > 1 else name for name, n in runs)


def _name(layer: LayerSpec) -> str:
    if isinstance(layer, BlockSpec):
        return layer.mixer.kind + (f"+{layer.channel.kind}" if layer.channel else "")
    inside = [_names(v) if isinstance(v, tuple) else v.kind for _, v in layer.inside()]
    return f"{layer.kind}({' '.join(inside)})" if inside else layer.kind


@dataclass(frozen=True)
class Candidate:
    """A model and the genes that made it. Candidates of equal specs are equal and hash alike.

    Args:
        spec: the filled template.
        genes: (path, option) of every hole that was filled, in the order of filling.
    """

    spec: ModelSpec
    genes: tuple[tuple[str, int], ...] = field(compare=False)

    @property
    def name(self) -> str:
        return name_of(self.spec)

    def to_spec(self, *, stem: Tokens | Signal | None = None) -> ModelSpec:
        """The model. Raises SpecError where the template's stem is another one than `stem`."""
        return with_stem(self.spec, stem)

    def to_dict(self) -> dict[str, int]:
        """The genes as plain data; `ModelSpace.decode` reads them."""
        return dict(self.genes)


class ModelSpace:
    """The models that a template stands for; implements `Space[Candidate]`.

    Every candidate passes `ModelSpec.check`. Parts that do not fit the width are drawn again, a
    bounded number of times.

    Args:
        template: plain data with holes; specs may stand in it.

    Attributes:
        template: as plain data, for JSON and YAML.

    Raises:
        SpecError: a hole or a part is malformed; the message starts with its path.
    """

    def __init__(self, template: Mapping[str, Any]) -> None:
        self.template = plain(template)
        self._root = parse(self.template)

    @classmethod
    def from_file(cls, path: str | Path, stem: Tokens | Signal | None = None) -> ModelSpace:
        """Read a template from YAML or JSON. Raises SpecError naming the file.

        Args:
            path: of the file.
            stem: of the task, for a template that leaves its own out.
        """
        template = read_document(path, "space")
        if stem is not None and isinstance(template, dict) and "stem" not in template:
            template = {**template, "stem": stem.to_dict()}
        try:
            return cls(template)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error

    @property
    def size(self) -> int:
        """The number of ways to fill the holes that give a valid model, exactly.

        Where options overlap, two ways may give the same model: `iterate` lists it once, and this
        counts it twice.
        """
        return self._root.count(0)

    def sample(self, rng: Xorshift64) -> Candidate:
        """Draw an option at every hole."""

        def draw(path: str, n: int) -> int:
            return rng.choice(range(n))

        reason = ""
        for _ in range(TRIES):
            try:
                return self._fill(draw, draw)
            except MisfitError as error:
                reason = str(error)
        raise SpecError(f"space: {TRIES} samples were all invalid, the last one because {reason}")

    def mutate(self, candidate: Candidate, rng: Xorshift64, prob: float) -> Candidate:
        """Draw each gene again with probability `prob`; it may stay the same.

        What the new choices bring with them is drawn afresh, and so is a part that does not fit
        the new width. If nothing fits, the candidate stays as it is.
        """
        old = dict(candidate.genes)

        def draw(path: str, n: int) -> int:
            return rng.choice(range(n))

        def decide(path: str, n: int) -> int:
            return draw(path, n) if path not in old or rng.next_f64() < prob else old[path]

        return self._try(decide, draw, candidate)

    def crossover(self, a: Candidate, b: Candidate, rng: Xorshift64) -> Candidate:
        """Take each gene from `a` or `b`, one fair coin per gene, if both have it.

        If the mixtures that come out do not fit, the child is `a`.
        """
        mine, theirs = dict(a.genes), dict(b.genes)

        def decide(path: str, n: int) -> int:
            # A hole exists in the child only because a parent chose what holds it.
            parents = [genes for genes in (mine, theirs) if path in genes]
            return (parents[0] if len(parents) == 1 else rng.choice(parents))[path]

        return self._try(decide, decide, a)

    def sizes(self, candidate: Candidate) -> list[Callable[[], Candidate | None]]:
        """What makes the candidate at each width of the space, narrow first; None where its parts
        do not fit.

        All its other genes stay, so where the template leaves no choice of d_model, it is the only
        one.
        """
        genes = dict(candidate.genes)
        hole, options = widths(self._root, genes)

        def at(option: int) -> Candidate | None:
            with suppress(MisfitError):
                return self._fill(lambda path, n: option if path == hole else genes[path], None)
            return None

        return [partial(at, options[d_model]) for d_model in sorted(options)]

    def iterate(self, limit: int | None = None) -> Sequence[Candidate]:
        """All models, each once, the last hole turning fastest, or the first `limit` of them."""
        found: dict[Candidate, None] = {}
        for candidate in every(lambda decide: self._fill(decide, None, exhaustive=True)):
            if limit is not None and len(found) >= limit:
                break
            found.setdefault(candidate)
        return list(found)

    def contains(self, candidate: object) -> bool:
        """Say whether the candidate's genes make its spec in this space."""
        if not isinstance(candidate, Candidate):
            return False
        try:
            made = self.decode(dict(candidate.genes))
        except SpecError:
            return False
        return made.spec == candidate.spec

    def build(self, decide: Decide) -> Candidate:
        """Fill the holes by asking `decide` for each; SpecError if the parts do not fit."""
        return self._fill(decide, None)

    def decode(self, genes: Mapping[str, int]) -> Candidate:
        """Make the candidate of these genes.

        Raises:
            SpecError: a gene is missing, unknown, or not the number of an option.
        """

        def decide(path: str, n: int) -> int:
            require(path in genes, path, "this gene is missing; give all genes of a candidate")
            gene = coerce(genes[path], int, path)
            require(0 <= gene < n, path, f"{gene} is not one of the {n} options, 0 to {n - 1}")
            return gene

        made = self._fill(decide, None)
        unknown = genes.keys() - dict(made.genes).keys()
        require(not unknown, ", ".join(sorted(unknown)), "no such hole in this candidate")
        return made

    def encode(self, spec: ModelSpec) -> Candidate | None:
        """The candidate of this space that is this model, if there is one."""
        genes = next(genes_of(self._root, spec), None)
        if genes is None:
            return None
        spec.check()
        return Candidate(spec, _kept(genes))

    def _try(self, decide: Decide, again: Decide, otherwise: Candidate) -> Candidate:
        for _ in range(TRIES):
            try:
                return self._fill(decide, again)
            except MisfitError:
                continue
        return otherwise

    def _fill(self, decide: Decide, again: Decide | None, *, exhaustive: bool = False) -> Candidate:
        walk = Walk(decide, again, exhaustive=exhaustive)
        spec = self._root.fill("", walk)
        return Candidate(spec, _kept(walk.genes))


def _kept(genes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(map(shared, genes.items()))
