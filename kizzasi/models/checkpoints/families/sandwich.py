"""Relatives of Llama whose layers have norms in other places, or scales: olmo2, gemma, granite.

| family | what it has beside Llama's |
|---|---|
| olmo2 | norms after each branch instead of before; queries and keys normalised as a whole |
| gemma2 | norms before and after, whose weights count from 1; scaled embeddings; caps of scores |
|   | and of logits; GELU gates; windows in every other layer; scores scaled by a number |
| gemma3_text | as gemma2, without caps; normalised queries and keys; windows in five layers of |
|   | six, with positions of their own |
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
from kizzasi.models.checkpoints.families.llama import (
    FULL,
    GATED,
    LAYER,
    LOCAL,
    SLIDES,
    TRUNK,
    attention,
    depth,
    dialect,
    first,
    heads,
    layer_kinds,
    normalised,
    positions,
    rope_keys,
    swiglu,
    trunk,
    window_keys,
)
from kizzasi.models.checkpoints.foreign import Rules
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
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


def _gemma(
    config: Config, mixers: Sequence[AttentionSpec], cap: float | None, **scores: Any
) -> ModelSpec:
    """What Gemma 2 and 3 share; `cap` is what silence about that of the logits means."""
    bias = config.get("attention_bias", bool, False)
    config.only("hidden_activation", "gelu_pytorch_tanh")
    config.skip("hidden_act")  # older files say gelu there; hidden_activation decides
    config.only("use_bidirectional_attention", False)
    channel = SwiGLUSpec(config.get("intermediate_size", int), activation="gelu_tanh")
    scale = config.get("query_pre_attn_scalar", float, 256.0) ** -0.5
    mixers = [replace(m, scale=scale, qkv_bias=bias, out_bias=bias, **scores) for m in mixers]
    blocks = [BlockSpec(m, channel, "rms_plus_one", norm_at="both") for m in mixers]
    cap = config.get("final_logit_softcapping", float, cap, null=None)
    spec = trunk(config, blocks, tied=True)
    return spec.replace(embed_scale=math.sqrt(spec.d_model), logit_cap=cap)


def _gemma2(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = depth(config, shapes)
    window = config.get("sliding_window", int, 4096, null=None)
    slides = layer_kinds(config, n_layers, [(LOCAL, FULL)[i % 2] for i in range(n_layers)], SLIDES)
    mixer = attention(config, n_kv_heads=4, head_dim=256)
    mixers = [replace(mixer, window=window if slide else None) for slide in slides]
    softcap = config.get("attn_logit_softcapping", float, 50.0, null=None)
    return _gemma(config, mixers, 30.0, softcap=softcap)


def _gemma3(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers, every = depth(config, shapes), config.get("sliding_window_pattern", int, 6)
    every = config.get("_sliding_window_pattern", int, every)
    window = config.get("sliding_window", int, 4096, null=None)
    usual = [LOCAL if (i + 1) % max(1, every) else FULL for i in range(n_layers)]
    slides = layer_kinds(config, n_layers, usual, SLIDES)
    context = config.get("max_position_embeddings", int, None)
    ropes = {FULL: config.within("rope_scaling"), LOCAL: None}
    nested = config.within("rope_parameters")
    if nested is not None:
        config.only("rope_scaling")
        ropes = {kind: nested.within(kind) for kind in ropes}
        nested.finish()
    usual = config.get("rope_theta", float, 1e6), config.get("rope_local_base_freq", float, 1e4)
    mixers = [
        replace(
            attention(config, 4, 256, rope=positions(keys, theta, context=context)),
            qk_norm=True,
            qk_norm_eps=config.get("rms_norm_eps", float, 1e-6),
            qk_norm_kind="rms_plus_one",
            window=window if kind == LOCAL else None,
        )
        for (kind, keys), theta in zip(ropes.items(), usual, strict=True)
    ]
    config.only("attn_logit_softcapping")  # which transformers would not read
    return _gemma(config, [mixers[slide] for slide in slides], None)


def _gemma3_keys(spec: ModelSpec) -> dict[str, Any]:
    """Layers of one kind say their positions together; those of the other keep the usual ones."""
    keys = _gemma_keys(spec)
    del keys["rope_theta"], keys["rope_scaling"]
    ropes: dict[str, Any] = {FULL: {"rope_theta": 1e6}, LOCAL: {"rope_theta": 1e4}}
    for kind, block in zip(keys["layer_types"], spec.plain_blocks, strict=True):
        if isinstance(block.mixer, AttentionSpec):
            said = rope_keys(block.mixer)
            ropes[kind] = {"rope_theta": said["rope_theta"], **(said["rope_scaling"] or {})}
    usual = {"rope_type": "default"}
    return {**keys, "rope_parameters": {kind: usual | rope for kind, rope in ropes.items()}}


def _gemma_keys(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = first(spec), spec.plain_blocks[0].channel
    if not isinstance(channel, SwiGLUSpec) or mixer.scale is None:
        raise SpecError("Gemma has gated channels and a scale of its own for scores")
    keys = heads(spec)
    del keys["hidden_act"]
    return {
        **keys,
        **window_keys(spec),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": mixer.qkv_bias,
        "query_pre_attn_scalar": _whole(mixer.scale**-2),
        "attn_logit_softcapping": mixer.softcap,
        "final_logit_softcapping": spec.logit_cap,
    }


def scaled(config: Config, spec: ModelSpec) -> ModelSpec:
    """With Granite's factors of embeddings, branches and logits."""
    scale = config.get("residual_multiplier", float, 1.0)
    return spec.replace(
        blocks=tuple(replace(block, residual_scale=scale) for block in spec.plain_blocks),
        embed_scale=config.get("embedding_multiplier", float, 1.0),
        logit_scale=1 / config.get("logits_scaling", float, 1.0),
    )


def scale_keys(spec: ModelSpec) -> dict[str, Any]:
    """What `scaled` reads."""
    return {
        "residual_multiplier": spec.plain_blocks[0].residual_scale,
        "embedding_multiplier": spec.embed_scale,
        "logits_scaling": 1 / spec.logit_scale,
    }


def _granite(config: Config, shapes: Shapes) -> ModelSpec:
    bias = config.get("attention_bias", bool, False)
    scale = config.get("attention_multiplier", float, 1.0)
    mixer = replace(attention(config), qkv_bias=bias, out_bias=bias, scale=scale)
    channel = swiglu(config, bias=config.get("mlp_bias", bool, False))
    return scaled(config, trunk(config, [BlockSpec(mixer, channel)] * depth(config, shapes)))


def _granite_keys(spec: ModelSpec) -> dict[str, Any]:
    channel, mixer = spec.plain_blocks[0].channel, first(spec)
    return {
        **heads(spec),
        **scale_keys(spec),
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": isinstance(channel, SwiGLUSpec) and channel.bias,
        "attention_multiplier": mixer.scale,
    }


def _whole(x: float) -> float:
    """A number that rounding kept from being whole."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x


OLMO2 = dialect("olmo2", "Olmo2ForCausalLM", _olmo2, _olmo2_keys, _layout(AFTER))
GEMMA2 = dialect("gemma2", "Gemma2ForCausalLM", _gemma2, _gemma_keys, _layout(BOTH))
GEMMA3 = dialect("gemma3_text", "Gemma3ForCausalLM", _gemma3, _gemma3_keys, _layout(BOTH))
GRANITE = dialect("granite", "GraniteForCausalLM", _granite, _granite_keys)
