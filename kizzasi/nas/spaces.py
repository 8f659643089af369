"""The families that a search space may name, as blocks of a real model.

A family turns the searchers' genes into a `BlockSpec`. Every gene reaches the model:

| family | mixer | d_state is | expand_factor is | channel |
|---|---|---|---|---|
| mamba | mamba | SSM state per channel | d_inner / d_model | none |
| rwkv | rwkv7 | head width | hidden / d_model of the channel mix | rwkv_channel |
| s4 | s4d | SSM state per channel | hidden / d_model | swiglu |
| transformer | attention, RoPE | head width | hidden / d_model | swiglu |

The head is tied to the embedding: at small sizes a second table is a large share of the budget.
"a+b" alternates families over the depth, for example "mamba+transformer".
"""

from __future__ import annotations

from collections.abc import Callable

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.channels import RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec, S4DSpec
from kizzasi.models.strict import unknown_name


def _mamba(d_model: int, d_state: int, expand: float) -> BlockSpec:
    return BlockSpec(MambaSpec(d_state=d_state, expand=expand))


def _rwkv(d_model: int, d_state: int, expand: float) -> BlockSpec:
    channel = RWKVChannelSpec(hidden=round(d_model * expand))
    return BlockSpec(RWKV7Spec(head_dim=d_state), channel, norm="layer")


def _s4(d_model: int, d_state: int, expand: float) -> BlockSpec:
    return BlockSpec(S4DSpec(d_state=d_state), SwiGLUSpec(hidden=round(d_model * expand)))


def _transformer(d_model: int, d_state: int, expand: float) -> BlockSpec:
    if d_model % d_state:
        raise SpecError(
            f"d_state: {d_state} is the head width and does not divide d_model {d_model}; "
            "choose a divisor"
        )
    heads = AttentionSpec(n_heads=d_model // d_state)
    return BlockSpec(heads, SwiGLUSpec(hidden=round(d_model * expand)))


FAMILIES: dict[str, Callable[[int, int, float], BlockSpec]] = {
    "mamba": _mamba,
    "rwkv": _rwkv,
    "s4": _s4,
    "transformer": _transformer,
}


def model_spec(
    model_type: str,
    *,
    d_model: int,
    d_state: int,
    n_layers: int,
    expand_factor: float,
    dropout: float,
    vocab_size: int,
) -> ModelSpec:
    """Turn genes into a real architecture.

    Raises:
        SpecError: an unknown family, or genes that do not fit each other.
    """
    names = model_type.split("+")
    for name in names:
        if name not in FAMILIES:
            raise SpecError(f"model_type: {name!r} {unknown_name(name, FAMILIES)}")
    blocks = [FAMILIES[name](d_model, d_state, expand_factor) for name in names]
    spec = ModelSpec(
        d_model=d_model,
        blocks=tuple(blocks[i % len(blocks)] for i in range(n_layers)),
        stem=Tokens(vocab_size),
        norm=blocks[0].norm,
        embed_norm=names[0] == "rwkv",
        tie_head=True,
        dropout=dropout,
    )
    spec.check()
    return spec
