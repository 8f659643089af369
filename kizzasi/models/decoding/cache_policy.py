"""How a model remembers keys and values, chosen after it was trained.

A policy is a part of the spec, `kv_quant`, `window` and `n_global` of attention: it decides what is
seen, in both forms, and what a state looks like. So another policy makes another model, with a
digest of its own and the same weights, and no state of one is taken for one of the other.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.mixers.attention import Attention, AttentionSpec
from kizzasi.models.mixers.mla import MLA, MLASpec
from kizzasi.models.ops.kv_codes import KVQuant
from kizzasi.strict import Strict

GROUP = 64  # of nf4: 0.3 of float16's bytes; fewer tokens take more and lose as much

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel


def with_cache(
    self: SequenceModel,
    quant: KVQuant = "none",
    *,
    window: int | None = None,
    n_global: int | None = None,
    group: int | None = None,
) -> SequenceModel:
    """The same model, its weights shared, with another cache of attention.

        model = load(folder).with_cache("nf4", window=8192, n_global=4)

    Args:
        quant: "nf4" (4 bits), "int8", "fp8" or "none"; see `AttentionSpec.kv_quant`.
        window: positions that a query sees at most, its own included; layers that see fewer stay as
            they are. None: as the model is.
        n_global: the first positions of a document, which stay visible beside a window, and are
            not coded. None: as the model is.
        group: tokens by which keys of attention are coded together, channel by channel, as soon as
            they are complete; see `AttentionSpec.kv_group`. 0: every token by itself, and at once.
            None: 64 for "nf4", 0 for others.

    Raises:
        SpecError: the model has no such layers, or they cannot do this.
    """
    group = (GROUP if quant == "nf4" else 0) if group is None else group
    change = partial(_changed, quant=quant, window=window, n_global=n_global, group=group or None)
    spec = rewritten(self.spec, change)
    kinds = {part.kind for _, part in self.spec.parts()}
    if not kinds & {AttentionSpec.kind, MLASpec.kind}:
        raise SpecError(
            f"with_cache: the model has no attention or mla, but {sorted(kinds)}, whose states are "
            "small; use it as it is"
        )
    spec.check()
    model = copy.deepcopy(self, {id(tensor): tensor for tensor in _tensors(self)})
    for module in model.modules():
        held = vars(module).get("spec")
        if isinstance(module, (Attention, MLA)):
            module.remember(change(module.spec))
        elif isinstance(held, Strict):
            module.spec = rewritten(held, change)  # pyright: ignore[reportAttributeAccessIssue]
    model._digest = model.spec.digest
    return model


def _tensors(model: SequenceModel) -> list[Tensor]:
    """Every tensor that a copy would hold twice."""
    held = [x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor)]
    return [*model.parameters(), *model.buffers(), *held]


def _changed(
    spec: Any, *, quant: KVQuant, window: int | None, n_global: int | None, group: int | None
) -> Any:
    if isinstance(spec, MLASpec):
        if window is not None or n_global:
            raise SpecError("with_cache: mla keeps all positions; leave window and n_global out")
        return dataclasses.replace(spec, kv_quant=quant)
    if not isinstance(spec, AttentionSpec) or not spec.causal:
        return spec
    changes: dict[str, Any] = {"kv_quant": quant, "kv_group": group}
    if window is not None and spec.block is None and window < spec.context_window:
        changes["window"] = window
    windowed = spec.block is not None or "window" in changes or spec.window is not None
    if n_global is not None and windowed:
        changes["n_global"] = n_global
    return dataclasses.replace(spec, **changes)


def rewritten(value: Any, change: Callable[[Any], Any]) -> Any:
    """A spec with `change` made to every attention in it, at any depth."""
    if isinstance(value, tuple):
        return tuple(rewritten(each, change) for each in value)
    if not isinstance(value, Strict):
        return value
    if isinstance(value, (AttentionSpec, MLASpec)):
        return change(value)
    names = [f.name for f in dataclasses.fields(value)]  # pyright: ignore[reportArgumentType]
    fields = {name: rewritten(getattr(value, name), change) for name in names}
    same = all(
        fields[name] is getattr(value, name) or fields[name] == getattr(value, name)
        for name in names
    )
    return value if same else dataclasses.replace(value, **fields)  # pyright: ignore[reportArgumentType, reportCallIssue, reportType]
