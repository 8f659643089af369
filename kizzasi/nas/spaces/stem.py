"""The stem of a candidate is that of the task, and never replaced without a word."""

from __future__ import annotations

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec, Signal, Tokens

Stem = Tokens | Signal


def with_stem(spec: ModelSpec, stem: Stem | None) -> ModelSpec:
    """The spec, if its stem is that of the task; a token stem may add positions of its own.

    Raises:
        SpecError: the stems differ; names both.
    """
    own = spec.stem
    if isinstance(own, Tokens) and isinstance(stem, Tokens) and stem.max_positions is None:
        own = Tokens(own.vocab_size)
    if stem is not None and own != stem:
        raise SpecError(
            f"stem: the model has {spec.stem}, and the task needs {stem}; "
            "give the model that stem, or leave the stem out of the space"
        )
    return spec
