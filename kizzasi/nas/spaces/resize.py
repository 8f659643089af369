"""A model at another size: the same layers of the same kinds, narrower or wider, or stacked.

Glossary
    d, d'     d_model of the model and of the twin
    n, n'     their parameters
    k         how often the twin has the model's layers, one stack on the other
    bent      how far the width of heads had to leave the model's own, in doublings
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import ChannelSpec, LayerSpec, MixerSpec, ModelSpec
from kizzasi.strict import field_types, require

Part = MixerSpec | ChannelSpec
WIDTHS = ("hidden", "shared_hidden", "d_inner")  # grow with d_model where they are given
SHARED_HEADS = ("n_kv_heads", "n_key_heads")  # divide n_heads where they are given
NEAR = 0.5  # doublings that the size may miss the wanted one by
STEP = 1.05  # from one width that `stretched` looks at to the next
MOST_STACKED = 64


def resized(spec: ModelSpec, n_params: int) -> ModelSpec:
    """The same model with a narrower residual stream, as near as it gets to a size.

        d' = argmin of  |log2(params(d') / n_params)| + max over parts of bent(d')

    Depth, kinds, states, windows and ranks stay. Hidden widths shrink with d_model. There are
    fewer heads of about the same width; where no such number of heads fits d', they become wider
    or narrower, which counts like a size missed by the same factor.

    Args:
        spec: valid.
        n_params: wanted, embeddings included.

    Raises:
        SpecError: no width makes a valid model within a factor of 1.4 of n_params.
    """
    found: list[tuple[float, float, int, ModelSpec]] = []
    at = functools.cache(_part_at)  # blocks repeat
    for d_model in range(1, spec.d_model):
        with suppress(SpecError):
            bent, twin = _at_width(spec, d_model, at)
            size = twin.cost(1).params
            miss = abs(math.log2(size / n_params))
            found.append((miss + bent, miss, size, twin))
    near = [one for one in found if one[1] <= NEAR]
    nearest = min(found, key=lambda one: one[1], default=None)
    at_all = f"the nearest one has {nearest[2]:,}" if nearest else "none is valid"
    rule = f"none below {spec.d_model} makes about {n_params:,} parameters of these layers"
    require(bool(near), "d_model", f"{rule}; {at_all}")
    return min(near, key=lambda one: one[0])[-1]


def at_width(spec: ModelSpec, d_model: int) -> ModelSpec:
    """The same model at another width: hidden widths and heads follow, as in `resized`.

    Raises:
        SpecError: a part does not fit the width.
    """
    return _at_width(spec, d_model, _part_at)[1]


def stretched(spec: ModelSpec, n_params: int) -> ModelSpec:
    """The same model at a larger or smaller budget: its layers stacked, and all of it wider.

        k  = the whole number nearest to (n' / n)^0.25 in doublings, at least 1
        d' = argmin of  |log2(params(k, d') / n')| + max over parts of bent(d')

    So depth grows as n^0.25 and width as n^0.375, as in the ready-made spaces. A stack of layers
    is repeated as a whole, which keeps their order and their shares. Hidden widths and ranks that
    are given grow with d_model, and so does the number of heads, at about the same head width.
    States and windows stay.

    Args:
        spec: valid.
        n_params: n', embeddings included.

    Raises:
        SpecError: no such model is valid and within a factor of 1.4 of n_params.

    Source: Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking", on the copies.
    """
    require(n_params > 0, "n_params", f"{n_params} must be above 0")
    ratio = n_params / spec.cost(1).params
    wanted = min(MOST_STACKED, max(1.0, ratio**0.25))
    by_depth = sorted(range(1, MOST_STACKED + 1), key=lambda k: abs(math.log2(k / wanted)))
    for k in by_depth[:3]:  # layers that refer to each other by number may not allow one
        found = _widths(spec.replace(blocks=spec.blocks * k), n_params)
        if found:
            return min(found, key=lambda one: one[0])[-1]
    raise _no_width(n_params)


def widened(spec: ModelSpec, n_params: int) -> ModelSpec:
    """The same layers, as many, narrower or wider: `stretched` without a stack, for muP.

    Raises:
        SpecError: as `stretched`.
    """
    require(n_params > 0, "n_params", f"{n_params} must be above 0")
    if found := _widths(spec, n_params):
        return min(found, key=lambda one: one[0])[-1]
    raise _no_width(n_params)


def _no_width(n_params: int) -> SpecError:
    return SpecError(
        f"n_params: these layers make no valid model near {n_params:,} parameters at any width; "
        "give another budget"
    )


def _widths(spec: ModelSpec, n_params: int) -> list[tuple[float, ModelSpec]]:
    """The model at widths near the budget, each with how far it misses it, heads included."""
    wider = functools.cache(functools.partial(_part_at, ranks=True))
    found: list[tuple[float, ModelSpec]] = []
    seen: set[int] = set()

    def look(d_model: int) -> int | None:
        seen.add(d_model)
        try:
            bent, twin = _at_width(spec, d_model, wider)
        except SpecError:
            return None
        size = twin.cost(1).params
        miss = abs(math.log2(size / n_params))
        if miss <= NEAR:
            found.append((miss + bent, twin))
        return size

    sizes: dict[int, int] = {}
    for up in (True, False):  # a ladder of widths from the model's own
        width = float(spec.d_model)
        while width >= 1:
            d_model = _grained(width)
            if d_model not in seen and (size := look(d_model)):
                sizes[d_model] = size
                if (size > 2 * n_params) if up else (2 * size < n_params):
                    break
            width *= STEP if up else 1 / STEP
    if sizes:
        nearest = min(sizes, key=lambda d: abs(math.log2(sizes[d] / n_params)))
        grain = 8 if nearest < 512 else 64
        for d_model in range(nearest - 4 * grain, nearest + 4 * grain + 1, min(grain, 8)):
            if d_model > 0 and d_model not in seen:
                look(d_model)
    return found


def _grained(width: float) -> int:
    """A width that matrix products and heads like."""
    grain = 64 if width >= 512 else 8 if width >= 32 else 1
    return max(1, grain * round(width / grain))


PartAt = Callable[[Part, int, int], tuple[float, Any]]


def _at_width(spec: ModelSpec, d_model: int, at: PartAt) -> tuple[float, ModelSpec]:
    """How far heads are bent at most, and the model. Raises SpecError where a part does not fit."""
    most, blocks = _stack(spec.blocks, lambda part: at(part, spec.d_model, d_model))
    twin = spec.replace(d_model=d_model, blocks=blocks)
    twin.check()
    return most, twin


def _stack(
    layers: tuple[LayerSpec, ...], at: Callable[[Part], tuple[float, Any]]
) -> tuple[float, tuple[LayerSpec, ...]]:
    """The layers with every part at the other width, at any depth."""
    twins, most = [], 0.0
    for layer in layers:
        own: dict[str, Any] = {}
        for name, value in layer.inside():
            stack = isinstance(value, tuple)
            bent, own[name] = _stack(value, at) if stack else at(value)
            most = max(most, bent)
        twins.append(replace(layer, **own))  # pyright: ignore[reportArgumentType]
    return most, tuple(twins)


def _part_at(part: Part, d: int, d_new: int, *, ranks: bool = False) -> tuple[float, Part]:
    """The part at another width, with the least bent heads that fit."""
    most, own = 0.0, {name: getattr(part, name) for name in field_types(type(part))}
    for name, value in own.items():
        grows = name in WIDTHS or (ranks and name.endswith("rank"))
        if grows and value:
            own[name] = max(1, round(value * d_new / d))
            continue
        inner = value if isinstance(value, tuple) else (value,)
        if inner and all(isinstance(one, Part) for one in inner):
            bent, twins = zip(*(_part_at(one, d, d_new, ranks=ranks) for one in inner), strict=True)
            most = max(most, *bent)
            own[name] = twins if isinstance(value, tuple) else twins[0]
    for bent, heads in sorted(_heads(own, d_new / d), key=lambda pair: pair[0]):
        twin = type(part)(**{**own, **heads})
        with suppress(SpecError):
            twin.check(d_new, "")
            return max(most, bent), twin
    raise SpecError(f"{part.kind}: no heads fit d_model {d_new}")


def _heads(own: dict[str, Any], ratio: float) -> Iterator[tuple[float, dict[str, int]]]:
    """Every way to divide a part into heads, and how far each is bent."""
    if n := own.get("n_heads"):
        for new in range(1, max(n, math.ceil(2 * n * ratio)) + 1 if ratio > 1 else n + 1):
            shared = {k: max(1, round(own[k] * new / n)) for k in SHARED_HEADS if own.get(k)}
            yield abs(math.log2(n * ratio / new)), {"n_heads": new, **shared}
    elif width := own.get("head_dim"):
        for new in range(1, 2 * width + 1):
            yield abs(math.log2(new / width)), {"head_dim": new}
    else:
        yield 0.0, {}
