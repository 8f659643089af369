"""Strict frozen dataclasses: what is no field, or not of a field's type, is an error with a path.

A `Strict` dataclass converts to plain JSON data and back. Reading refuses unknown keys (with the
nearest known name), wrong types and non-finite numbers, so that a typo can never be a default.
A `Registered` family is chosen by the key "kind", for example {"kind": "mamba", "d_state": 16}.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

from kizzasi.errors import SpecError

Self = TypeVar("Self", bound="Strict")
Family = TypeVar("Family", bound=type)


def require(rule: bool, path: str, message: str) -> None:
    """Raise `SpecError("path: message")` unless the rule holds."""
    if not rule:
        raise SpecError(f"{path}: {message}" if path else message)


def unknown_name(name: object, known: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; choose from {known}"


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


class Strict:
    """Base of every spec: JSON data in, JSON data out, both ways without loss."""

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any], path: str = "") -> Self:
        """Read plain data. Raises SpecError for unknown or missing keys and wrong types."""
        require(isinstance(data, Mapping), path, f"expected a mapping, got {data!r:.80}")
        hints = field_types(cls)
        for key in data:
            if key not in hints:  # names are compared only now: a search reads many specs
                raise SpecError(f"{join(path, str(key))}: {unknown_name(key, hints)}")
        for f in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
            optional = (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
            require(optional or f.name in data, join(path, f.name), "missing; give a value")
        return cls(**{k: coerce(v, hints[k], join(path, k)) for k, v in data.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every field written out, in the declared types (a float 1 is 1.0)."""
        return {k: plain(getattr(self, k), h, k) for k, h in field_types(type(self)).items()}

    def canonical_json(self) -> str:
        """One text per value: sorted keys, no white space, no field left to a default."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def require_positive(self, path: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value > 0, join(path, name), f"{value} is not positive; give at least 1")


class Registered(Strict):
    """A family of specs told apart by "kind"; each abstract family keeps its own registry.

    elsewhere    kind -> the module that registers it, imported when the kind is first named
    """

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type]]
    elsewhere: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def known(cls) -> list[str]:
        """The kinds that a spec may name, those of `elsewhere` included."""
        return sorted({*cls.registry, *cls.elsewhere})

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any], path: str = "") -> Self:
        if "kind" in cls.__dict__:
            given = dict(data)
            kind = given.pop("kind", cls.kind)  # pyright: ignore[reportAttributeAccessIssue]
            require(kind == cls.__dict__["kind"], join(path, "kind"), f"{kind!r} is not this kind")
            return super().from_dict(given, path)  # pyright: ignore[reportReturnType]
        require(isinstance(data, Mapping), path, f"expected a mapping, got {data!r:.80}")
        registry, known = cls.registry, cls.known()  # pyright: ignore[reportAttributeAccessIssue]
        require("kind" in data, join(path, "kind"), f"missing; choose from {known}")
        kind = data["kind"]
        if kind not in known:
            raise SpecError(f"{join(path, 'kind')}: {kind!r} {unknown_name(kind, known)}")
        if kind not in registry:
            importlib.import_module(cls.elsewhere[kind])  # pyright: ignore[reportAttributeAccessIssue]
        return registry[kind].from_dict(data, path)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().to_dict()}


def register(cls: Family) -> Family:
    """Class decorator: make a concrete spec known to its family under its `kind`."""
    registry = cls.registry
    assert cls.kind not in registry, f"{cls.kind} is registered twice"
    registry[cls.kind] = cls
    return cls


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Turn plain data into a value of the annotated type, or raise SpecError with the path."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return coerce(value, inner, path)
    if origin is Literal:
        require(value in args, path, f"{value!r} is not one of {list(args)}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), path, f"expected a list, got {value!r:.80}")
        return tuple(coerce(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Strict):
        return hint.from_dict(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(right, path, f"expected {hint.__name__}, got {value!r:.80}")
    if hint is float:
        require(math.isfinite(value), path, f"{value} is not finite")
    return value


def plain(value: Any, hint: Any, path: str) -> Any:
    if isinstance(value, Strict):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        (item, *_) = typing.get_args(hint)
        return [plain(v, item, f"{path}[{i}]") for i, v in enumerate(value)]
    return coerce(value, hint, path)
