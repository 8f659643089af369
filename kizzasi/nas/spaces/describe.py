"""What a search says of a candidate of any space: its model, name, family and genes.

A candidate is an `ArchCandidate`, a `Candidate` of a `ModelSpace`, a `ModelSpec` itself, or
anything of yours with a method `to_spec(stem=...)`; with `described(stem)` it says the rest, too.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from kizzasi.models import Cost, MixerSpec, ModelSpec
from kizzasi.nas.spaces.families import ArchCandidate, analytic_score
from kizzasi.nas.spaces.model_space import Candidate, name_of
from kizzasi.nas.spaces.stem import Stem, with_stem


@dataclass(frozen=True)
class Description:
    """A candidate in words and plain data.

    Args:
        spec: its model.
        name: for tables.
        family: its members share a learning rate.
        genotype: the genes that made it, by name; None if there are none.
        proxy: the analytic score, higher is better.
        estimated_params: by a formula, if there is one.
        settings: of the training, where the candidate brings its own; None takes those of its
            family.
    """

    spec: ModelSpec
    name: str
    family: str
    genotype: tuple[tuple[str, Any], ...] | None = None
    proxy: float | None = None
    estimated_params: int | None = None
    settings: dict[str, Any] | None = None


@runtime_checkable
class Described(Protocol):
    """A candidate that describes itself."""

    def described(self, stem: Stem | None) -> Description: ...


def spec_of(candidate: Any, stem: Stem | None) -> ModelSpec:
    """The model of a candidate, with the stem of the task.

    Raises:
        SpecError: genes that do not fit each other, or a model whose own stem is another one.
    """
    if isinstance(candidate, ModelSpec):
        return with_stem(candidate, stem)
    return candidate.to_spec(stem=stem)


@lru_cache(maxsize=2**8)
def cost_at(spec: ModelSpec, seq_len: int) -> Cost:
    """What a model costs, which rules, entries and objectives ask in turn."""
    return spec.cost(seq_len)


def describe(candidate: Any, stem: Stem | None) -> Description:
    """What is to be said of a candidate. Raises SpecError as `spec_of` does."""
    if isinstance(candidate, Described):
        return candidate.described(stem)
    spec = spec_of(candidate, stem)
    if isinstance(candidate, ArchCandidate):
        return Description(
            spec,
            candidate.name,
            candidate.model_type,
            tuple(dataclasses.asdict(candidate).items()),
            candidate.proxy_score(),
            candidate.param_count(),
        )
    genes = candidate.genes if isinstance(candidate, Candidate) else None
    name = f"{name_of(spec)} {spec.digest[:4]}"  # widths are not in a name
    return Description(spec, name, main_mixer(spec), genes, analytic_score(spec))


def main_mixer(spec: ModelSpec) -> str:
    """The family of a model whose layers differ: "mostly" the mixer that most of them have, and of
    equals the one that comes first. Its members share a learning rate."""
    kinds = Counter(part.kind for _, part in spec.parts() if isinstance(part, MixerSpec))
    return sys.intern(f"mostly {kinds.most_common(1)[0][0]}")
