"""Any field of any spec drawn anew, by its type: what no named move reaches, this one does."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.pipelines.space.tree import Path, RefusedError, nodes, put
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.strict import Registered, Strict, field_types

NO_GENES = ("stem", "heads")  # of the model: they belong to the task
WHOLE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)  # for a number that was none
REAL = (0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0, 30.0)
TRIES = 8  # at the fields of one model


def fields_of(spec: ModelSpec) -> Iterator[tuple[Path, str, Any, Any]]:
    """Every field that can be drawn: path of its node, name, type, value."""
    for path, node in nodes(spec):
        if path and path[0] in NO_GENES:
            continue
        for name, hint in field_types(type(node)).items():
            value = getattr(node, name)
            gene = not (path == () and name in (*NO_GENES, "blocks"))
            if gene and not _of_specs(value) and hint is not str:
                yield path, name, hint, value


def any_field(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Draw one field anew; equal layers follow where they are one module."""
    found = list(fields_of(spec))
    reason: SpecError = RefusedError("no field")
    for _ in range(TRIES):
        path, name, hint, value = rng.choice(found)
        try:
            changed = put(spec, (*path, name), redrawn(value, hint, rng))
            changed.check()
            return _alike(spec, changed, path, rng)
        except SpecError as error:
            reason = error
    raise RefusedError(f"{TRIES} fields drawn anew did not fit, the last one: {reason}")


def _alike(spec: ModelSpec, changed: ModelSpec, path: Path, rng: Xorshift64) -> ModelSpec:
    """The change in one layer in three of four cases made in all layers equal to it."""
    if path[:1] != ("blocks",) or rng.next_f64() < 0.25:
        return changed
    i = path[1]
    assert isinstance(i, int)
    old, new = spec.blocks[i], changed.blocks[i]
    return spec.replace(blocks=tuple(new if layer == old else layer for layer in spec.blocks))


def redrawn(value: Any, hint: Any, rng: Xorshift64) -> Any:
    """Another value of the type. Raises RefusedError where there is none to draw."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        if value is not None and len(inner) < len(args) and rng.next_f64() < 0.25:
            return None
        return redrawn(value, rng.choice(inner), rng)
    if origin is Literal:
        return _other(value, args, rng)
    if origin is tuple and value and isinstance(value[0], (int, float)):
        i = rng.choice(range(len(value)))
        return (*value[:i], redrawn(value[i], args[0], rng), *value[i + 1 :])
    if origin is tuple and isinstance(args[0], type) and issubclass(args[0], Strict):
        return (*value, fresh(args[0], rng))
    if hint is bool:
        return not value
    if hint is int:
        steps = WHOLE if value is None else (value + 1, value - 1, 2 * value, value // 2)
        return _other(value, [n for n in steps if n >= 0], rng)
    if hint is float:
        steps = REAL if not value else (0.5 * value, 0.8 * value, 1.25 * value, 2 * value, 0.0)
        return _other(value, steps, rng)
    if isinstance(hint, type) and issubclass(hint, Strict) and value is None:
        return fresh(hint, rng)
    raise RefusedError(f"{value!r:.40}: nothing else to draw")


def fresh(family: type[Strict], rng: Xorshift64) -> Any:
    """A spec of a class or family, with defaults where it has them."""
    if issubclass(family, Registered) and "registry" in vars(family):
        family = rng.choice([family.registry[kind] for kind in sorted(family.registry)])
    given = {}
    hints = field_types(family)
    for field in dataclasses.fields(family):  # pyright: ignore[reportArgumentType]
        if field.default is field.default_factory is dataclasses.MISSING:
            given[field.name] = redrawn(None, hints[field.name], rng)
    return family(**given)


def _other(value: Any, options: Any, rng: Xorshift64) -> Any:
    left = [option for option in options if option != value or type(option) is not type(value)]
    if not left:
        raise RefusedError(f"{value!r:.40}: nothing else to draw")
    return rng.choice(left)


def _of_specs(value: Any) -> bool:
    """Whether this is a part, or parts: they are swapped, inserted and deleted, not drawn."""
    return isinstance(value, Strict) or (
        isinstance(value, tuple) and any(isinstance(one, Strict) for one in value)
    )
