"""From a `Document` to text: what was said, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from kizzasi.nas.pipelines.parts import Own
from kizzasi.strict import Strict

LINE = 96  # a mapping without mappings inside that fits is written on one line


class _Flow(dict):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Flow,
    lambda dumper, data: dumper.represent_mapping(
        "tag:yaml.org,2002:map", data.items(), flow_style=True
    ),
)


def said(value: Any) -> Any:
    """Plain data with the fields that differ from their defaults."""
    if isinstance(value, Own):
        return {"kind": value.spec.kind, **_differing(value.spec)}
    if isinstance(value, Strict):
        kind = getattr(type(value), "kind", None)
        named = {"kind": kind} if isinstance(kind, str) else {}
        return {**named, **_differing(value)}
    if isinstance(value, (tuple, list)):
        return [said(one) for one in value]
    if isinstance(value, dict):
        return {key: said(one) for key, one in value.items()}
    return value


def _differing(value: Strict) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
        own = getattr(value, field.name)
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default  # pyright: ignore
        if own != default or type(own) is not type(default):
            found[field.name] = said(own)
    return found


def to_yaml(data: Any, width: int = LINE) -> str:
    """Plain data as YAML; small mappings on one line."""
    return yaml.dump(_flowing(data), Dumper=_Dumper, sort_keys=False, width=width + 24)


def _flowing(data: Any) -> Any:
    if isinstance(data, list):
        return [_flowing(one) for one in data]
    if not isinstance(data, dict):
        return data
    short = len(yaml.safe_dump(data, default_flow_style=True, width=10_000)) <= LINE
    return _Flow(data) if short and data else {k: _flowing(v) for k, v in data.items()}
