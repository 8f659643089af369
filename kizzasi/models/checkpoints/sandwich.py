"""Relatives of Llama whose layers have norms in other places, or scales: olmo2, gemma2, granite.

| family | what it has beside Llama's |
|---|---|
| olmo2 | norms after each branch instead of before; queries and keys normalised as a whole |
| gemma2 | norms before and after, whose weights count from 1; scaled embeddings; caps of scores |
|   | and of logits; GELU gates; windows in every other layer; scores scaled by a number |
| granite | factors of embeddings, branches, scores and logits |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.foreign import Rules
from kizzasi.models.checkpoints.llama import (
    GATED,
    LAYER,
    TRUNK,
    attention,
    depth,
    dialect,
    first,
    heads,
    normalised,
    swiglu,
    trunk,
)
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.stored import Shapes
from kizzasi.models.spec import BlockSpec, ModelSpec

PRE = {"blocks.#.mixer_norm.@", "blocks.#.channel_norm.@"}
NO_NORMS = {ours: theirs for ours, theirs in (TRUNK | GATED).items() if ours not in PRE}
AFTER = {
    "blocks.#.mixer_post_norm.@": LAYER + "post_attention_layernorm.@",
    "blocks.#.channel_post_norm.@": LAYER + "post_feedforward_layernorm.@",
}
BOTH = AFTER | {
    "blocks.#.mixer_norm.@": LAYER + "input_layernorm.@",
    "blocks.#.channel_norm.@": LAYER + "pre_feedforward_layernorm.@",
}


def _layout(norms: dict[str, str]) -> Any:
    def layouts(_: ModelSpec) -> Sequence[Rules]:
        return [renamed(NO_NORMS | norms)]

    return layouts


def _olmo2(config: Config, shapes: Shapes) -> ModelSpec:
    mixer = normalised(attention(config, n_kv_heads=None), config, "full", eps=1e-5)
    block = BlockSpec(mixer, swiglu(config), norm_at="post")
    return trunk(config, [block] * depth(config, shapes), eps=1e-5)


def _olmo2_keys(spec: ModelSpec) -> dict[str, Any]:
    return {**heads(spec), "attention_bias": first(spec).qkv_bias}


def _gemma2(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = depth(config, shapes)
    window = config.get("sliding_window", int, 4096, null=None)
    usual = ("sliding_attention", "full_attention") * (n_layers // 2 + 1)
    kinds = config.get("layer_types", tuple[str, ...], usual[:n_layers])
    odd = set(kinds) - {"sliding_attention", "full_attention"}
    if odd or len(kinds) != n_layers:
        config.refuse("layer_types", f"{list(kinds)} do not fit {n_layers} layers")
    bias = config.get("attention_bias", bool, False)
    mixer = replace(
        attention(config, n_kv_heads=4, head_dim=256),
        scale=config.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
        softcap=config.get("attn_logit_softcapping", float, 50.0, null=None),
        qkv_bias=bias,
        out_bias=bias,
    )
    config.only("hidden_activation", "gelu_pytorch_tanh")
    config.skip("hidden_act")  # older files say gelu there; hidden_activation decides
    config.only("use_bidirectional_attention", False)
    channel = SwiGLUSpec(config.get("intermediate_size", int), activation="gelu_tanh")
    blocks = [
        BlockSpec(
            replace(mixer, window=window if kind == "sliding_attention" else None),
            channel,
            "rms_plus_one",
            norm_at="both",
        )
        for kind in kinds
    ]
    tied = config.get("tie_word_embeddings", bool, True)
    spec = trunk(config, blocks).replace(norm="rms_plus_one", tie_head=tied)
    cap = config.get("final_logit_softcapping", float, 30.0, null=None)
    return spec.replace(embed_scale=math.sqrt(spec.d_model), logit_cap=cap)


def _gemma2_keys(spec: ModelSpec) -> dict[str, Any]:
    mixer, windows = first(spec), [getattr(b.mixer, "window", None) for b in spec.blocks]
    used = [window for window in windows if window is not None]
    channel = spec.blocks[0].channel
    if not isinstance(channel, SwiGLUSpec) or mixer.scale is None:
        raise SpecError("Gemma 2 has gated channels and a scale of its own for scores")
    keys = heads(spec)
    del keys["hidden_act"]
    return {
        **keys,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": mixer.qkv_bias,
        "query_pre_attn_scalar": _whole(mixer.scale**-2),
        "attn_logit_softcapping": mixer.softcap,
        "final_logit_softcapping": spec.logit_cap,
        "sliding_window": used[0] if used else None,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def _granite(config: Config, shapes: Shapes) -> ModelSpec:
    bias = config.get("attention_bias", bool, False)
    mixer = replace(
        attention(config),
        qkv_bias=bias,
        out_bias=bias,
        scale=config.get("attention_multiplier", float, 1.0),
    )
    channel = swiglu(config, bias=config.get("mlp_bias", bool, False))
    scale = config.get("residual_multiplier", float, 1.0)
    block = BlockSpec(mixer, channel, residual_scale=scale)
    return trunk(config, [block] * depth(config, shapes)).replace(
        embed_scale=config.get("embedding_multiplier", float, 1.0),
        logit_scale=1 / config.get("logits_scaling", float, 1.0),
    )


def _granite_keys(spec: ModelSpec) -> dict[str, Any]:
    block, mixer = spec.blocks[0], first(spec)
    bias = isinstance(block.channel, SwiGLUSpec) and block.channel.bias
    return {
        **heads(spec),
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": bias,
        "attention_multiplier": mixer.scale,
        "residual_multiplier": block.residual_scale,
        "embedding_multiplier": spec.embed_scale,
        "logits_scaling": 1 / spec.logit_scale,
    }


def _whole(x: float) -> float:
    """A number that rounding kept from being whole."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x


OLMO2 = dialect("olmo2", "Olmo2ForCausalLM", _olmo2, _olmo2_keys, _layout(AFTER))
GEMMA2 = dialect("gemma2", "Gemma2ForCausalLM", _gemma2, _gemma2_keys, _layout(BOTH))
GRANITE = dialect("granite", "GraniteForCausalLM", _granite, _granite_keys)
