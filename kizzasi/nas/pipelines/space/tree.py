"""A spec as a tree: its nodes with their paths, and a copy with one of them exchanged.

Glossary
    path   names of fields and positions in tuples, outermost first
    run    equal layers one after the other: a module of a pipeline
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.strict import Registered, Strict

Path = tuple[str | int, ...]


class RefusedError(SpecError):
    """A move that cannot be made; the message says why."""


def nodes(value: Any, path: Path = ()) -> Iterator[tuple[Path, Strict]]:
    """Every spec in a spec, itself first."""
    if isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from nodes(inner, (*path, i))
    elif isinstance(value, Strict):
        yield path, value
        for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
            yield from nodes(getattr(value, field.name), (*path, field.name))


def put(value: Any, path: Path, new: Any) -> Any:
    """A copy with what is at the path exchanged."""
    if not path:
        return new
    first, rest = path[0], path[1:]
    if isinstance(value, tuple):
        assert isinstance(first, int)
        return (*value[:first], put(value[first], rest, new), *value[first + 1 :])
    inner = put(getattr(value, str(first)), rest, new)
    return dataclasses.replace(value, **{str(first): inner})


def at(value: Any, path: Path) -> Any:
    """What is at the path."""
    for step in path:
        value = value[step] if isinstance(step, int) else getattr(value, step)
    return value


def of_kind(value: Any, *kinds: str) -> list[tuple[Path, Any]]:
    """The parts of these kinds with their paths."""
    return [(p, n) for p, n in nodes(value) if isinstance(n, Registered) and n.kind in kinds]


def runs(spec: ModelSpec) -> list[list[Any]]:
    """The layers, equal neighbours together."""
    return [list(run) for _, run in groupby(spec.blocks)]


def joined(spec: ModelSpec, layers: list[list[Any]], **more: Any) -> ModelSpec:
    """The spec with these runs as its layers."""
    blocks = tuple(layer for run in layers for layer in run)
    if not blocks:
        raise RefusedError("blocks: nothing would be left; a model has at least one layer")
    return spec.replace(blocks=blocks, **more)


def on_a_layer(spec: ModelSpec, rng: Xorshift64, change: Callable[[Any], Any]) -> ModelSpec:
    """Change the layers of a run alike, or one of them alone; runs where `change` refuses are
    passed over.

    Raises RefusedError with the last reason, if it refuses all of them.
    """
    whole = runs(spec)
    order = list(range(len(whole)))
    rng.shuffle(order)
    reason: SpecError = RefusedError("no layer")
    for i in order:
        try:
            new = change(whole[i][0])
        except SpecError as error:
            reason = error
            continue
        run = whole[i]
        if len(run) > 1 and rng.next_f64() < 0.25:
            j = rng.choice(range(len(run)))
            changed = [*run[:j], new, *run[j + 1 :]]
        else:
            changed = [new] * len(run)
        return joined(spec, [*whole[:i], changed, *whole[i + 1 :]])
    raise RefusedError(str(reason))


def on_a_part(
    spec: ModelSpec, rng: Xorshift64, kinds: tuple[str, ...], change: Callable[[Any], Any]
) -> ModelSpec:
    """Change one part of these kinds, wherever it stands."""

    def in_layer(layer: Any) -> Any:
        found = of_kind(layer, *kinds)
        if not found:
            raise RefusedError(f"no layer has a part of the kinds {', '.join(kinds)}")
        rng.shuffle(found)
        reason: SpecError = RefusedError("no part")
        for path, part in found:
            try:
                return put(layer, path, change(part))
            except SpecError as error:
                reason = error
        raise RefusedError(str(reason))

    return on_a_layer(spec, rng, in_layer)
