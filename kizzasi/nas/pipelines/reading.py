"""From a file to a `Document`: strict, with every unknown key and broken bound found at once."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kizzasi.documents import read_document
from kizzasi.errors import SpecError
from kizzasi.nas.pipelines.document import Document
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.nas.pipelines.parts import Open
from kizzasi.strict import Strict, field_types, join, unknown_name


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (3e-4 is one) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if key != "<<" and keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} is twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain data of a file. Raises SpecError naming the file."""
    data = read_document(path, "pipeline", _Loader)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a mapping with arch and train, got {data!r:.60}")
    return data


def is_pipeline(data: Any) -> bool:
    """Whether plain data are meant as a pipeline and not as a ModelSpec."""
    return isinstance(data, Mapping) and "arch" in data


def read(data: Any, findings: Findings) -> Document | None:
    """Plain data as a Document; None if it has no meaning as one, which is then found.

    Unknown keys and numbers out of bounds are found and passed over; the rest stops.
    """
    known = _known_part(data, Document, "", findings)
    try:
        document = Document.from_dict(known)
    except SpecError as error:
        path, _, rule = str(error).partition(": ")
        findings.add(path, rule, "")
        return None
    return _bounds(document, "", findings)


def _known_part(value: Any, hint: Any, path: str, findings: Findings) -> Any:
    """The value without its unknown keys at any depth."""
    inner = _strict_in(hint)
    if isinstance(value, list):
        return [_known_part(v, hint, f"{path}[{i}]", findings) for i, v in enumerate(value)]
    if not isinstance(value, Mapping) or inner is None:
        return value
    if typing.get_origin(hint) is dict:
        return {k: _known_part(v, inner, join(path, str(k)), findings) for k, v in value.items()}
    if issubclass(inner, Open) and value.get("kind") in inner.family.known():
        return value  # the house's own reader says what is wrong with it
    hints, kept = field_types(inner), {}
    for key, item in value.items():
        if key in hints:
            kept[key] = _known_part(item, hints[key], join(path, str(key)), findings)
        else:
            _unknown(str(key), item, value, hints, path, findings)
    return kept


def _unknown(
    key: str,
    item: Any,
    given: Mapping[Any, Any],
    hints: Mapping[str, Any],
    path: str,
    findings: Findings,
) -> None:
    where = join(path, key)
    near = difflib.get_close_matches(key, hints, n=1)
    changes: list[tuple[str, Any]] = [(where, DROP)]
    if near and near[0] not in given:
        changes.append((join(path, near[0]), item))
    findings.add(where, unknown_name(key, hints), "", *changes)


def _strict_in(hint: Any) -> type[Strict] | None:
    """The Strict class inside a hint such as Mixer | None or tuple[Mixer, ...]."""
    if isinstance(hint, type):
        return hint if issubclass(hint, Strict) else None
    return next(filter(None, map(_strict_in, typing.get_args(hint))), None)


def _bounds(value: Any, path: str, findings: Findings) -> Any:
    """The value with every number moved into its bounds, each such move found."""
    if isinstance(value, tuple):
        return tuple(_bounds(v, f"{path}[{i}]", findings) for i, v in enumerate(value))
    if isinstance(value, dict):
        return {k: _bounds(v, join(path, k), findings) for k, v in value.items()}
    if not isinstance(value, Strict) or not type(value).__module__.startswith(__package__ or ""):
        return value
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
        given, where = getattr(value, field.name), join(path, field.name)
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            found = next(_broken(given, field.metadata), None)
            if found is not None:
                rule, nearest = found
                given = findings.set(where, f"{given} {rule}", type(given)(nearest))
        else:
            given = _bounds(given, where, findings)
        moved[field.name] = given
    return type.__call__(type(value), **moved)  # a call of the class would read it all again


def _broken(number: float, bounds: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "minimum" in bounds and number < bounds["minimum"]:
        yield f"is below {bounds['minimum']}", bounds["minimum"]
    if "maximum" in bounds and number > bounds["maximum"]:
        yield f"is above {bounds['maximum']}", bounds["maximum"]
    low = bounds.get("exclusiveMinimum")
    if low is not None and number <= low:
        yield f"is not above {low}", low + 1
