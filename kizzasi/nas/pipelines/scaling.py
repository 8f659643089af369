"""A smaller twin of a document: widths and vocabulary shrink in proportion, the rest stays.

Heads keep their number and become narrower. What a budget allows is meant for the full size, so a
twin has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.nas.pipelines.misfits import DROP, changed, describe_change, found_at, steps
from kizzasi.nas.pipelines.pipeline import Pipeline, repaired

BYTES = 256  # a vocabulary that holds all bytes goes on doing so
IN_PROPORTION = ("head_dim", "dim", "latent_dim", "hidden", "shared_hidden", "d_inner")


def scaled(data: Any, scale: float) -> tuple[Any, list[str]]:
    """Data that fit, scaled, and every change in words.

    Args:
        data: of a document without misfits.
        scale: factor of widths and vocabulary, above 0.

    Raises:
        SpecError: the scale is out of range, or no such twin fits.
    """
    if not 0 < scale <= 1:
        raise SpecError(f"scale: {scale} is outside (0, 1]; give a share of the full size")
    Pipeline.from_data(data)
    changes, twin = [], data
    for path, value in _changes(data, scale):
        if value is DROP or value != found_at(twin, path):
            changes.append(describe_change(twin, path, value))
            twin = changed(twin, path, value)
    twin, repairs = repaired(twin)
    return twin, changes + repairs


def _changes(data: Any, scale: float) -> Iterator[tuple[str, Any]]:
    nodes = list(_numbers(data, ""))
    heads = [value for path, value in nodes if steps(path)[-1] in ("heads", "n_heads")]
    unit = 2 * math.lcm(*heads) if heads else 2
    if unit > scale * data["arch"]["d_model"] * 2:  # no common multiple near: repairs see to heads
        unit = 2 * max(heads)

    def multiple(of: int) -> Callable[[float], int]:
        return lambda value: max(1, round(scale * value / of)) * of

    def vocabulary(value: float) -> int:
        return max(min(int(value), BYTES), round(scale * value))

    rules: dict[str, Callable[[float], int]] = {
        "d_model": multiple(unit),
        "dims": multiple(2),
        "rope_dims": multiple(2),
        "vocab_size": vocabulary,
        "output_dim": vocabulary,
        **dict.fromkeys(IN_PROPORTION, multiple(1)),
        "head_dim": multiple(2),
    }
    for path, value in nodes:
        last = steps(path)[-1]
        if last in rules and ("budget" not in steps(path)):
            yield path, rules[str(last)](value)
    for path in _budgets(data):
        yield path, DROP


def _budgets(data: Any) -> Iterator[str]:
    """Where budgets stand that are meant for the full size."""
    if found_at(data, "budget") is not None:
        yield "budget"
    if found_at(data, "train.budget.flops_per_step") is not None:
        yield "train.budget.flops_per_step"
    for i, stage in enumerate(found_at(data, "arch.pipeline") or ()):
        if stage.get("budget") is not None:
            yield f"arch.pipeline[{i}].budget"
    for name, module in (found_at(data, "arch.modules") or {}).items():
        if module.get("budget") is not None:
            yield f"arch.modules.{name}.budget"


def _numbers(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Every whole number with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{path}[{i}]")
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
