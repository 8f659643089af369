"""The JSON Schema of pipelines, for editors: made from the classes of `document`, nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any, Literal, Union

from kizzasi.nas.pipelines.document import Document
from kizzasi.nas.pipelines.parts import Open
from kizzasi.strict import Registered, Strict, field_types

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a whole file."""
    parts: dict[str, Any] = {}
    root = _reference(Document, parts)
    return {"$schema": DRAFT, "title": "kizzasi pipeline", **root, "$defs": parts}


def _reference(cls: type, parts: dict[str, Any]) -> dict[str, Any]:
    name = cls.__name__
    if name not in parts:
        parts[name] = {}  # before its fields, which may hold it
        parts[name] = _object(cls, parts)
    return {"$ref": f"#/$defs/{name}"}


def _object(cls: type, parts: dict[str, Any]) -> dict[str, Any]:
    if issubclass(cls, Registered) and "registry" in vars(cls):
        return {"anyOf": [_reference(one, parts) for _, one in sorted(cls.registry.items())]}
    hints, told, required, fields = field_types(cls), _told(cls), [], {}
    kind = getattr(cls, "kind", None)
    if issubclass(cls, Registered) and isinstance(kind, str):
        fields["kind"], required = {"const": kind}, ["kind"]
    for f in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        needed = f.default is f.default_factory is dataclasses.MISSING
        required += [f.name] if needed else []
        bounds = {k: v for k, v in f.metadata.items() if k != "added"}
        text = {"description": told[f.name]} if f.name in told else {}
        fields[f.name] = {**_type(hints[f.name], parts), **bounds, **text}
    found: dict[str, Any] = {"type": "object", "properties": fields, "additionalProperties": False}
    found |= {"required": required} if required else {}
    found |= {"description": inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]}
    if issubclass(cls, Open):
        return {"anyOf": [found, _reference(cls.family, parts)]}
    return found


def _type(hint: Any, parts: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [_type(one, parts) for one in args if one is not type(None)]
        return inner[0] if len(inner) == 1 else {"anyOf": inner}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": _type(args[0], parts)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(args[1], parts)}
    if isinstance(hint, type) and issubclass(hint, Strict):
        return _reference(hint, parts)
    names = {int: "integer", float: "number", bool: "boolean", str: "string"}
    return {"type": names[hint]} if hint in names else {}


def _told(cls: type) -> dict[str, str]:
    """What the class says of its fields, under Args or in one line."""
    text = inspect.cleandoc(cls.__doc__ or "")
    _, found, listed = text.partition("Args:\n")
    if not found:
        return {}
    entries = re.split(r"\n(?=    \w[\w, ]*: )", "\n" + listed)
    told = {}
    for entry in filter(None, map(str.strip, entries)):
        names, _, meaning = entry.partition(": ")
        told |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return told
