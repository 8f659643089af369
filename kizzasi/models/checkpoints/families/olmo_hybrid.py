"""OLMo-hybrid, as transformers stores it: Gated DeltaNet with norms before, and attention, with
whole queries and keys normalised, with norms after.

transformers 5.24 writes the filters of queries, keys and values as three equal parts of all,
whatever their widths; such files are read too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.jamba import attention_keys
from kizzasi.models.checkpoints.families.mamba_hf import d_model_of, only_mixer
from kizzasi.models.checkpoints.families.qwen3_next import (
    KINDS,
    by_key_head,
    canonical,
    delta_keys,
    delta_of,
    kinds_key,
)
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import Form, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.gated_delta import GatedDeltaSpec
from kizzasi.models.spec import BlockSpec, ModelSpec

MIX = llama.LAYER + "linear_attn."
NORM_EPS = 1e-5  # of the delta layers' outputs, whatever the config says
LATER = llama.LAYER + "feedforward_layer_norm.@"
NAMES = {
    **llama.TRUNK,
    **llama.GATED,
    "blocks.#.mixer_norm.@": llama.LAYER + "attention_layer_norm.@",
    "blocks.#.channel_norm.@": LATER,
    "blocks.#.channel_post_norm.@": llama.LAYER + "post_feedforward_layernorm.@",
    "blocks.#.mixer.@": MIX + "@",
    "blocks.#.mixer.norm.@": MIX + "o_norm.@",
    "blocks.#.mixer.out_proj.@": MIX + "o_proj.@",
}
# Of the norm after attention: as transformers 5.24 writes it, and as it was published.
AFTER = (LATER, llama.LAYER + "post_attention_layernorm.@")
INIT = ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers, d_model = llama.depth(config, shapes), d_model_of(config, shapes)
    usual = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(n_layers)]
    usual = usual if "full_attention" in usual else [*usual[:-1], "full_attention"]
    attends = llama.layer_kinds(config, n_layers, usual, KINDS)
    heads = llama.normalised(_heads(config), config, "full")
    n = config.get("linear_num_key_heads", int, heads.n_heads)
    d_k = config.get("linear_key_head_dim", int, int(0.75 * d_model / max(1, n)))
    numbers = {"linear_num_value_heads": heads.n_heads, "linear_num_key_heads": n}
    numbers |= {"linear_key_head_dim": d_k, "linear_value_head_dim": 2 * d_k}
    delta = replace(
        delta_of(config, NORM_EPS, **numbers),
        negative_eigenvalues=config.get("linear_allow_neg_eigval", bool, True),
    )
    config.skip(*(f"linear_{key}" for key in INIT))  # of fresh weights
    channel = llama.swiglu(config)
    block = {True: BlockSpec(heads, channel, norm_at="post"), False: BlockSpec(delta, channel)}
    return llama.trunk(config, [block[attend] for attend in attends])


def _heads(config: Config) -> AttentionSpec:
    """Published models have no positions: their `rope_theta` is null."""
    said = config.data.get("rope_parameters")
    turned = not isinstance(said, dict) or said.get("rope_theta") is not None
    if turned:
        return llama.attention(config)
    config.skip("rope_parameters", "max_position_embeddings")
    return replace(llama.attention(config, rope=llama.Positions(1e4, None, 1.0)), position="none")


def _keys(spec: ModelSpec) -> dict[str, Any]:
    delta, heads = only_mixer(spec, GatedDeltaSpec), only_mixer(spec, AttentionSpec)
    keys = attention_keys(spec)
    if heads.position == "none":
        del keys["rope_scaling"], keys["rope_theta"]
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
    return {
        "architectures": ["OlmoHybridForCausalLM"],
        "model_type": "olmo_hybrid",
        **keys,
        **delta_keys(delta, spec.d_model),
        **kinds_key(spec),
        "linear_allow_neg_eigval": delta.negative_eigenvalues,
        "attention_bias": heads.qkv_bias,
    }


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    delta = only_mixer(spec, GatedDeltaSpec)
    (d_k, d_v), (qkvz, ba) = delta.widths(spec.d_model), by_key_head(delta, spec.d_model)
    keys = delta.key_heads * d_k
    parts = [keys, keys, delta.n_heads * d_v]
    ours, three = "blocks.#.mixer.", [f"{MIX}{x}_conv1d.@" for x in "qkv"]
    rules = [
        Rule(f"{ours}in_proj_qkvz.@", [f"{MIX}{x}_proj.@" for x in "qkvg"], qkvz),
        Rule(f"{ours}in_proj_ba.@", [f"{MIX}{x}_proj.@" for x in "ba"], ba),
    ]
    return [
        [
            *rules,
            Rule(f"{ours}conv1d.@", three, _split(how)),
            *renamed(NAMES | {"blocks.#.mixer_post_norm.@": name}),
        ]
        for how in (lambda t: t.split(parts), lambda t: t.chunk(3))
        for name in AFTER
    ]


def _split(how: Callable[[Tensor], Sequence[Tensor]]) -> Form:
    """One tensor of ours in three."""
    return Form(lambda ours: list(how(ours[0])), lambda theirs, shapes: [torch.cat(theirs)])


OLMO_HYBRID = register(
    Family(
        "olmo_hybrid",
        _spec,
        _layouts,
        _keys,
        ignored=llama.ROTARY_BUFFERS,
        tied=llama.TIED,
        canonical=canonical,
    )
)
