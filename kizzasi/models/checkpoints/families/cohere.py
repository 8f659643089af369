"""Command R and R7B (cohere, cohere2), as transformers stores them: both branches read the stream
through one norm, and factors on the logits.

Pairs of neighbours turn there. Rows of queries and keys are put in our order, in which the two
halves of a head turn, in all layers; where nothing turns (every fourth layer of cohere2) scores do
not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
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
    swiglu,
    trunk,
    window_keys,
)
from kizzasi.models.checkpoints.foreign import Rules
from kizzasi.models.checkpoints.names import Form, Rule, interleaved, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.spec import BlockSpec, ModelSpec

EPS = "layer_norm_eps"


def _mixer(config: Config) -> AttentionSpec:
    bias, eps = config.get("attention_bias", bool, False), config.get(EPS, float, 1e-5)
    mixer = replace(attention(config, theta=5e5), qkv_bias=bias, out_bias=bias)
    if not config.get("use_qk_norm", bool, False):
        return mixer
    return replace(mixer, qk_norm="head", qk_norm_kind="layer_unbiased", qk_norm_eps=eps)


def _model(config: Config, mixers: Sequence[AttentionSpec]) -> ModelSpec:
    channel = swiglu(config)
    blocks = [BlockSpec(m, channel, "layer_unbiased", parallel="shared") for m in mixers]
    scale = config.get("logit_scale", float, 0.0625)
    return trunk(config, blocks, 1e-5, key=EPS, tied=True).replace(logit_scale=scale)


def _cohere(config: Config, shapes: Shapes) -> ModelSpec:
    return _model(config, [_mixer(config)] * depth(config, shapes))


def _cohere2(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers, every = depth(config, shapes), config.get("sliding_window_pattern", int, 4)
    usual = [LOCAL if (i + 1) % max(1, every) else FULL for i in range(n_layers)]
    slides = layer_kinds(config, n_layers, usual, SLIDES)
    turned = replace(_mixer(config), window=config.get("sliding_window", int, 4096))
    plain = replace(turned, window=None, position="none", rope_theta=1e4, rope_scaling=None)
    config.skip("cache_implementation")  # speed
    return _model(config, [turned if slide else plain for slide in slides])


def _keys(spec: ModelSpec) -> dict[str, Any]:
    keys = heads(spec)
    eps = keys.pop("rms_norm_eps")
    more = {EPS: eps, "logit_scale": spec.logit_scale}
    return {**keys, **more, "attention_bias": first(spec).qkv_bias}


def _cohere_keys(spec: ModelSpec) -> dict[str, Any]:
    return {**_keys(spec), "use_qk_norm": bool(first(spec).qk_norm)}


def _cohere2_keys(spec: ModelSpec) -> dict[str, Any]:
    turned = [b for b in spec.plain_blocks if isinstance(b.mixer, AttentionSpec) and b.mixer.window]
    if not turned:
        raise SpecError("no block has a window, and the format needs one where positions turn")
    depth = {"num_hidden_layers": len(spec.blocks)}
    return {**_keys(spec.replace(blocks=tuple(turned))), **depth, **window_keys(spec)}


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    width = first(spec).width(spec.d_model)
    form = interleaved(width)
    norm = Form(  # one row for each head
        lambda ours: [t.unflatten(0, (-1, width)) for t in form.write(ours)],
        lambda theirs, shapes: form.read([t.flatten() for t in theirs], shapes),
    )
    pairs = [
        Rule(f"blocks.#.mixer.{x}_{part}.@", f"{LAYER}self_attn.{x}_{part}.@", how)
        for x in "qk"
        for part, how in (("proj", form), ("norm", norm))
    ]
    return [[*pairs, *renamed(TRUNK | GATED)]]


COHERE = dialect("cohere", "CohereForCausalLM", _cohere, _cohere_keys, _layouts)
COHERE2 = dialect("cohere2", "Cohere2ForCausalLM", _cohere2, _cohere2_keys, _layouts)
