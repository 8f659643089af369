"""Ready-made search spaces, and the families that a space of families may name.

`tiny`, `hybrid`, `mamba_rwkv` and `moe` are spaces of models with holes: each layer chooses its own
mixer and channel, or layers repeat by a pattern. They are made for small models, 32 to 192 wide;
see `ModelSpace` for others.

Families are the blocks of an `ArchSearchSpace`, which gives all layers the same genes.

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
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.channels import RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec, S4DSpec
from kizzasi.models.strict import unknown_name
from kizzasi.nas.holes import choice, pattern, repeat
from kizzasi.nas.model_space import ModelSpace


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


WIDTHS = choice(48, 56, 64, 72, 80, 88, 96, 112, 128, 160, 192)  # fine, to meet a narrow band

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


def tiny(vocab_size: int = 256) -> ModelSpace:
    """One to three layers of Mamba or attention: 1,752 models, few enough to train them all."""
    mamba = {"mixer": {"kind": "mamba", "d_state": choice(8, 16)}}
    attention = {
        "mixer": {"kind": "attention", "n_heads": choice(2, 4)},
        "channel": choice(None, {"kind": "swiglu"}, {"kind": "swiglu", "hidden": 64}),
    }
    return _space(vocab_size, choice(32, 48, 64), repeat(choice(mamba, attention), 1, 3))


def hybrid(vocab_size: int = 256) -> ModelSpace:
    """Two to eight layers, recurrent, state-space or attention, most with a channel mixer."""
    heads = choice(2, 4, 8)
    mixer = choice(
        {"kind": "mamba", "d_state": choice(8, 16, 32), "expand": choice(1.0, 1.5, 2.0)},
        {"kind": "mamba2", "d_state": choice(16, 32, 64), "head_dim": choice(16, 32)},
        {"kind": "rwkv7", "head_dim": choice(8, 16, 32)},
        {"kind": "gla", "n_heads": heads, "expand_k": choice(0.5, 1.0)},
        {"kind": "gated_delta", "n_heads": heads},
        {"kind": "retention", "n_heads": heads},
        {"kind": "s4d", "d_state": choice(16, 64)},
        {"kind": "attention", "n_heads": heads, "window": choice(None, 32, 128)},
    )
    return _space(vocab_size, WIDTHS, _layers({"mixer": mixer, "channel": _channel(None)}, 8))


def mamba_rwkv(vocab_size: int = 256) -> ModelSpace:
    """Two to eight layers of the Mamba and RWKV families: a state of constant size."""
    mixer = choice(
        {"kind": "mamba", "d_state": choice(8, 16, 32), "expand": choice(1.0, 1.5, 2.0)},
        {"kind": "mamba2", "d_state": choice(16, 32, 64), "head_dim": choice(16, 32)},
        {"kind": "rwkv6", "head_dim": choice(8, 16, 32)},
        {"kind": "rwkv7", "head_dim": choice(8, 16, 32)},
    )
    block = {"mixer": mixer, "channel": _channel(None, {"kind": "rwkv_channel"})}
    return _space(vocab_size, WIDTHS, _layers(block, 8))


def moe(vocab_size: int = 256) -> ModelSpace:
    """Two to six layers of Mamba or attention, each with a dense channel mixer or experts."""
    experts = {
        "kind": "moe",
        "n_experts": choice(4, 8),
        "top_k": choice(1, 2),
        "hidden": choice(32, 64, 128),
        "shared_hidden": choice(0, 64),
    }
    mixer = choice(
        {"kind": "mamba", "d_state": choice(8, 16), "expand": choice(1.0, 2.0)},
        {"kind": "attention", "n_heads": choice(2, 4, 8), "window": choice(None, 64)},
    )
    block = {"mixer": mixer, "channel": _channel(experts)}
    return _space(vocab_size, WIDTHS, _layers(block, 6))


def _layers(block: Any, most: int) -> dict[str, Any]:
    """Two layers or more: one or two blocks tiled over the depth, or every layer on its own."""
    texts = ("a", "ab", "aab", "aaab")
    tiled = pattern(*texts, n_layers=choice(*range(2, most + 1)), a=block, b=block)
    return choice(tiled, repeat(block, 2, most))


def _channel(*more: Any) -> dict[str, Any]:
    """A SwiGLU of some width, an MLP, or one of `more`."""
    swiglu = {"kind": "swiglu", "hidden": choice(64, 128, 256, 384)}
    mlp = {"kind": "mlp", "hidden": choice(128, 256), "activation": "relu2"}
    return choice(swiglu, mlp, *more)


def _space(vocab_size: int, d_model: Any, blocks: Any) -> ModelSpace:
    stem = {"kind": "tokens", "vocab_size": vocab_size}
    return ModelSpace({"d_model": d_model, "stem": stem, "tie_head": True, "blocks": blocks})
