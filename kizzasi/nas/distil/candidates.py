"""Ready-made candidates: what may stand in the place of softmax attention, by short names.

| name | what | source |
|---|---|---|
| window-N | the layer's own attention, which sees its last N tokens and the first 4 | 2309.17453 |
| kv-heads-N | N heads of keys and values, means of those that were | 2305.13245 |
| int8, nf4 | the same attention with a coded cache, keys by channel in nf4 | 2402.02750 |
| gla | gated linear attention with as many heads | 2312.06635 |
| mamba2 | Mamba-2 with a head for each query head | 2405.21060, 2408.15237 |
| short-conv-N | a gated convolution over N tokens | 2511.23404 |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import MixerSpec
from kizzasi.strict import unknown_name

SINKS = 4  # first tokens that every window keeps in sight
NAMES = ("window-N", "kv-heads-N", "int8", "nf4", "gla", "mamba2", "short-conv-N")


def ready_made(names: Sequence[str], own: MixerSpec, d_model: int) -> dict[str, MixerSpec]:
    """The candidates of these names for layers with such an attention.

    Args:
        names: as in the table above.
        own: the layers' mixer.
        d_model: of the model.

    Raises:
        SpecError: an unknown name, or `own` is no softmax attention.
    """
    if own.kind != "attention":
        raise SpecError(f"candidates: made for attention, not for {own.kind!r}; give specs")
    return {name: _of_name(name, own, d_model) for name in names}


def _of_name(name: str, own: Any, d_model: int) -> MixerSpec:
    numbered = re.fullmatch(r"(.+)-(\d{1,9})", name)
    form, n = (f"{numbered[1]}-N", int(numbered[2])) if numbered else (name, 0)
    h, width = own.n_heads, own.width(d_model)
    expand = h * width / d_model
    if name in ("int8", "nf4"):
        return replace(own, kv_quant=name, kv_group=64 if name == "nf4" else None)
    if form == "window-N":
        return replace(own, window=n, n_global=SINKS)
    if form == "kv-heads-N":
        return replace(own, n_kv_heads=n, head_dim=width)
    plain: dict[str, dict[str, Any]] = {
        "gla": {"kind": "gla", "n_heads": h, "expand_k": expand, "expand_v": expand},
        "mamba2": {"kind": "mamba2", "expand": expand, "head_dim": width, "d_state": width}
        | {"n_groups": h},
        "short-conv-N": {"kind": "short_conv", "d_conv": n},
    }
    if form not in plain:
        raise SpecError(f"candidates: {name!r:.60} {unknown_name(form, NAMES)}")
    return MixerSpec.from_dict(plain[form])
