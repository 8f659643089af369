"""The layers of a model in words: what a report's sketch and a model card's table say."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from kizzasi.documents import cut
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, LayerSpec, ModelSpec
from kizzasi.nas.report.svg import short

# Fields that set a part's width or reach, in the order they are named.
DETAILS = (
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "kv_lora_rank",
    "window",
    "d_state",
    "d_inner",
    "hidden",
    "n_experts",
    "top_k",
    "max_len",
    "version",
)
INSIDE = ("mixers", "body")  # fields that hold several parts, or layers


def layer_rows(spec: dict[str, Any]) -> list[list[str]]:
    """Input, layers and output as (which, box, box, ...); a box is "kind: details".

    Equal neighbours share a row. Each part says what it holds, if its kind is known here: a space
    may use kinds that only an extension registers.

    Raises:
        SpecError: no model's spec at all.
    """
    try:
        return _layer_rows(spec)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise SpecError(f"spec: {cut(spec)}: of no model ({error!s:.100})") from error


def _layer_rows(spec: dict[str, Any]) -> list[list[str]]:
    stem = {k: v for k, v in spec["stem"].items() if k != "kind" and v is not None}
    rows = [["input", f"{spec['stem']['kind']}: {_pairs(stem)}, d_model {spec['d_model']}"]]
    boxes = [
        [_box(part, spec["d_model"], n) for part, n in zip(parts, counts, strict=True)]
        for parts, counts in zip(map(_parts, spec["blocks"]), _param_counts(spec), strict=True)
    ]
    first = 1
    for block, equal in groupby(boxes):
        last = first + len(list(equal)) - 1
        rows.append([f"layer {first}" if first == last else f"layers {first}-{last}", *block])
        first = last + 1
    head = "head: tied to the embedding" if spec["tie_head"] else "head: linear"
    return [*rows, ["output", f"{spec['norm']} norm", head]]


def _parts(block: dict[str, Any]) -> list[dict[str, Any]]:
    """The branches of a plain block; another layer is one box."""
    if "kind" in block:
        return [block]
    return [part for part in (block["mixer"], block["channel"]) if part is not None]


def _param_counts(spec: dict[str, Any]) -> list[list[int | None]]:
    """Parameters of each part of each layer."""
    try:
        model = ModelSpec.from_dict(spec)
    except SpecError:
        return [[None for _ in _parts(block)] for block in spec["blocks"]]
    return [
        [part.cost(model.layer_context(i), 1, 1).params for part in _costed(layer)]
        for i, layer in enumerate(model.settled())
    ]


def _costed(layer: LayerSpec) -> list[Any]:
    return [part for _, part in layer.parts()] if isinstance(layer, BlockSpec) else [layer]


def _box(part: dict[str, Any], d_model: int, params: int | None) -> str:
    details = {key: part[key] for key in DETAILS if part.get(key) is not None}
    if "expand" in part:
        details["d_inner"] = int(part["expand"] * d_model)
    pairs = [_pairs(details)] if details else []
    pairs += [] if params is None else [f"{short(params)} params"]
    return f"{_kind(part)}: {', '.join(pairs)}" if pairs else _kind(part)


def _kind(part: dict[str, Any]) -> str:
    """The kind, and of a composite what it is made of."""
    if "kind" not in part:
        return "+".join(map(_kind, _parts(part)))
    inner = [one for key in INSIDE for one in part.get(key, [])]
    inner = inner or ([part["mixer"]] if "mixer" in part else [])
    return f"{part['kind']} of {' and '.join(map(_kind, inner))}" if inner else part["kind"]


def _pairs(values: dict[str, Any]) -> str:
    numbers = {k: f"{v:g}" if isinstance(v, float) else v for k, v in values.items()}
    return ", ".join(f"{k} {v}" for k, v in numbers.items())
