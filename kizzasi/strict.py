"""Strict frozen dataclasses: what is no field, or not of a field's type, is an error with a path.

A `Strict` dataclass converts to plain JSON data and back. Reading it, and calling its class, refuse
unknown names (with the nearest known one), wrong types and non-finite numbers, so that a typo can
never be a default. What both store has the declared types: a list becomes a tuple, a float 7 is
7.0, a true flag True; so equal specs have one text and one digest.
A `Registered` family is chosen by the key "kind", for example {"kind": "mamba", "d_state": 16}.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import numbers
import types
import typing
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Literal, TypeVar, Union

from kizzasi.documents import cut
from kizzasi.errors import SpecError

Self = TypeVar("Self", bound="Strict")
Family = TypeVar("Family", bound=type)

BY_PLACE = 3
MOST = 2**64  # of a whole number
PLAIN = (bool, int, float, str, type(None))
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def require(rule: bool, path: str, message: str) -> None:
    """Raise `SpecError("path: message")` unless the rule holds."""
    if not rule:
        raise SpecError(f"{path}: {message}" if path else message)


def require_mapping(data: object, path: str) -> None:
    """Raise `SpecError` unless it is one; the message is made only then, as data may be large."""
    if not isinstance(data, Mapping):
        require(False, path, f"expected a mapping, got {cut(data)}")


def unknown_name(name: object, known: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(cut(name).strip("'"), known, n=1)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; choose from {known}"


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, bool, bool, Any], ...]:
    """Name, whether it may be left out, whether 0.1 had it not, and default of every field."""
    return tuple(
        (
            f.name,
            (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING),
            "added" in f.metadata,
            f.default,
        )
        for f in dataclasses.fields(cls)
    )


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Origin and arguments of an annotation."""
    return typing.get_origin(hint), typing.get_args(hint)


def added(default: Any) -> Any:
    """Default of a field that 0.1 did not have: there it is left out of the canonical JSON.

    So a spec that does without the field keeps the digest it always had. Named in calls only.
    """
    return dataclasses.field(default=default, metadata={"added": True}, kw_only=True)


def _refuse_missing(cls: type, given: Mapping[str, Any], path: str) -> None:
    for name, optional, _, _ in _fields(cls):
        if not optional and name not in given:
            require(False, join(path, name), "missing; give a value")


class StrictType(ABCMeta):
    """Type of the specs: a call is checked and stored in the declared types, as `from_dict` is.

    The first BY_PLACE fields may be given by place; later ones by name only.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Raises SpecError for an unknown or missing name, or a value of a wrong type."""
        hints, name = field_types(cls), cls.__name__
        if len(args) > BY_PLACE:
            later = list(hints)[BY_PLACE : len(args)]
            remedy = f"give {', '.join(later)} by name" if later else f"it has {len(hints)} fields"
            raise SpecError(f"{name}: got {len(args)} values by place; {remedy}")
        given = dict(zip(hints, args, strict=False))
        for key in kwargs:
            if key not in hints:
                raise SpecError(f"{name}.{key}: {unknown_name(key, hints)}")
            if key in given:
                require(False, f"{name}.{key}", "given twice, by place and by name")
        given |= kwargs
        _refuse_missing(cls, given, name)
        return super().__call__(**{k: coerce(v, hints[k], k) for k, v in given.items()})


class Strict(metaclass=StrictType):
    """Base of every spec: JSON data in, JSON data out, both ways without loss."""

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any], path: str = "") -> Self:
        """Read plain data. Raises SpecError for unknown or missing keys and wrong types."""
        require_mapping(data, path)
        hints = field_types(cls)
        for key in data:
            if key not in hints:  # names are compared only now: a search reads many specs
                raise SpecError(
                    f"{join(path, cut(key).strip(chr(39)))}: {unknown_name(key, hints)}"
                )
        _refuse_missing(cls, data, path)
        values = {k: coerce(v, hints[k], join(path, k)) for k, v in data.items()}
        return type.__call__(cls, **values)  # a call of the class would check them again

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every field written out."""
        return self._data(brief=False)

    def canonical_json(self) -> str:
        """One text per value: sorted keys, no white space, all fields but `added` ones at their
        defaults."""
        return CANONICAL.encode(self._data(brief=True))

    def _data(self, *, brief: bool) -> dict[str, Any]:
        hints, data = field_types(type(self)), {}
        for name, _, later, default in _fields(type(self)):
            value = getattr(self, name)
            if not (brief and later and value == default):
                known = type(value) in PLAIN  # a spec is checked when it is made
                data[name] = value if known else plain(value, hints[name], name, brief=brief)
        return data

    def require_positive(self, path: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value > 0, join(path, name), f"{value} is not positive; give at least 1")


class Registered(Strict):
    """A family of specs told apart by "kind"; each abstract family keeps its own registry.

    elsewhere    kind -> the module that registers it, imported when the kind is first named
    plain_kind   what data without the key "kind" mean; None: the key is required
    """

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type]]
    elsewhere: ClassVar[Mapping[str, str]] = {}
    plain_kind: ClassVar[str | None] = None

    @classmethod
    def known(cls) -> list[str]:
        """The kinds that a spec may name, those of `elsewhere` included."""
        return sorted({*cls.registry, *cls.elsewhere})

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any], path: str = "") -> Self:
        if "kind" in cls.__dict__:
            given = dict(data)
            kind = given.pop("kind", cls.kind)  # pyright: ignore[reportAttributeAccessIssue]
            require(
                kind == cls.__dict__["kind"], join(path, "kind"), f"{cut(kind)} is not this kind"
            )
            return super().from_dict(given, path)  # pyright: ignore[reportReturnType]
        require_mapping(data, path)
        registry, known = cls.registry, cls.known()  # pyright: ignore[reportAttributeAccessIssue]
        kind = data.get("kind", cls.plain_kind)  # pyright: ignore[reportAttributeAccessIssue]
        require(kind is not None, join(path, "kind"), f"missing; choose from {known}")
        if kind not in known:
            raise SpecError(f"{join(path, 'kind')}: {cut(kind)} {unknown_name(kind, known)}")
        if kind not in registry:
            importlib.import_module(cls.elsewhere[kind])  # pyright: ignore[reportAttributeAccessIssue]
        return registry[kind].from_dict(data, path)

    def _data(self, *, brief: bool) -> dict[str, Any]:
        return {"kind": self.kind, **super()._data(brief=brief)}


def register(cls: Family) -> Family:
    """Class decorator: make a concrete spec known to its family under its `kind`."""
    registry = cls.registry
    assert cls.kind not in registry, f"{cls.kind} is registered twice"
    registry[cls.kind] = cls
    return cls


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Turn plain data into a value of the annotated type, or raise SpecError with the path."""
    if type(hint) is type and hint in PLAIN:
        return _scalar(value, hint, path)
    origin, args = _parts(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        *first, last = [a for a in args if a is not type(None)]
        for hint in first:
            with suppress(SpecError):
                return coerce(value, hint, path)
        return coerce(value, last, path)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(cut(value).strip("'"), map(str, args), n=1)
            remedy = f"; did you mean {near[0]}?" if near else ""
            raise SpecError(f"{path}: {cut(value)} is not one of {list(args)}{remedy}")
        return args[args.index(value)]
    if origin is tuple:
        one = isinstance(value, Strict)
        remedy = f"; for one alone, write ({type(value).__name__}(..),)" if one else ""
        right = isinstance(value, (list, tuple))
        if not right:
            raise SpecError(f"{path}: expected a list, got {cut(value)}{remedy}")
        return tuple(coerce(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        require_mapping(value, path)
        return {str(k): coerce(v, args[1], join(path, str(k))) for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Strict):
        return _spec(value, hint, path)
    return _scalar(value, hint, path)


def _spec(value: Any, hint: type[Strict], path: str) -> Any:
    """A spec as it is, or one read from plain data."""
    if not isinstance(value, Strict):
        return hint.from_dict(value, path)
    if isinstance(value, hint):
        return value
    member: type[Strict] | None = hint
    if issubclass(hint, Registered) and "registry" in vars(hint):
        member = hint.registry.get(hint.plain_kind or "")
    hints = field_types(member).values() if member else ()
    parts = [t for h in hints for t in (h, *typing.get_args(h))]
    wraps = any(isinstance(t, type) and isinstance(value, t) for t in parts)
    # A part of another family is refused by `check`, which knows where in a model it stands.
    if member is not hint and isinstance(value, Registered) and not wraps:
        return value
    wrong, wanted = type(value).__name__, (member or hint).__name__
    remedy = f"; wrap it: {wanted}({wrong}(..))" if wraps else ""
    raise SpecError(f"{path}: expected a {wanted}, got a {wrong}{remedy}")


def _scalar(value: Any, hint: type, path: str) -> Any:
    """A bool, int, float or str, in exactly that type; numpy's integers and floats are taken."""
    if type(value) is hint and hint in (str, bool):
        return value
    flag = isinstance(value, bool)
    kinds = {int: numbers.Integral, float: numbers.Real}
    if not flag and type(value) is not hint and isinstance(value, kinds.get(hint, ())):
        try:
            value = hint(value)
        except (OverflowError, ValueError) as error:
            raise SpecError(f"{path}: {cut(value)} is no {hint.__name__}") from error
    if not (isinstance(value, hint) and (hint is bool or not flag)):
        raise SpecError(f"{path}: expected {hint.__name__}, got {cut(value)}")
    if hint is int and abs(value) >= MOST:
        raise SpecError(f"{path}: {cut(value)} is beyond 2^64")
    if hint is float:
        require(math.isfinite(value), path, f"{value} is not finite")
        value += 0.0  # -0.0 equals 0.0 and is written otherwise
    return value


def plain(value: Any, hint: Any, path: str, *, brief: bool = False) -> Any:
    if type(value) in PLAIN:
        return coerce(value, hint, path)
    if isinstance(value, Strict):
        return value._data(brief=brief)
    if isinstance(value, (list, tuple)):
        options = (hint,) if _parts(hint)[0] is tuple else _parts(hint)[1]
        hint = next((own for own in options if _parts(own)[0] is tuple), hint)
        (item, *_) = _parts(hint)[1] or (Any,)
        return [plain(v, item, f"{path}[{i}]", brief=brief) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        (_, inner) = _parts(hint)[1] or (str, Any)
        return {k: plain(v, inner, join(path, k), brief=brief) for k, v in value.items()}
    return coerce(value, hint, path)
