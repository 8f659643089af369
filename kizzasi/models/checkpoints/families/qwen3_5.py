"""Qwen3.5's dense text models, as transformers stores them: Qwen3-Next's layers with the parts of
the delta layers' projections apart, and dense channels.

Positions of pictures (`mrope_section`) are those of text where there is only text: they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.jamba import attention_keys
from kizzasi.models.checkpoints.families.mamba_hf import only_mixer
from kizzasi.models.checkpoints.families.qwen3_next import (
    DRAFT,
    USUAL,
    attending,
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

PICTURES = ("mrope_section", "mrope_interleaved")
MIX = llama.LAYER + "linear_attn."
NAMES = {
    "blocks.#.mixer.@": MIX + "@",
    **{f"blocks.#.mixer.{part}.@": f"{MIX}{part}.@" for part in ("conv1d", "norm", "out_proj")},
}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    rope, said = None, config.data.get("rope_parameters")
    if isinstance(said, dict):
        keys = {key: value for key, value in said.items() if key not in PICTURES}
        inner = Config(keys, config.where, "rope_parameters.")
        rope = llama.positions(inner, 1e4, 0.25, partly=True)
        config.skip("rope_parameters", "max_position_embeddings")
    heads = llama.attention(config, n_kv_heads=4, head_dim=256, rotated=0.25, rope=rope)
    heads = replace(llama.normalised(heads, config), qk_norm_kind="rms_plus_one", gate=True)
    delta = delta_of(config, config.get("rms_norm_eps", float, 1e-6), **USUAL)
    channel = llama.swiglu(config)
    config.skip("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    config.skip("attn_output_gate")  # always
    mixers = [heads if attends else delta for attends in attending(config, n_layers)]
    return llama.trunk(config, [BlockSpec(m, channel, norm="rms_plus_one") for m in mixers])


def _keys(spec: ModelSpec) -> dict[str, Any]:
    delta, heads = only_mixer(spec, GatedDeltaSpec), only_mixer(spec, AttentionSpec)
    width = heads.width(spec.d_model)
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        **attention_keys(spec),
        **delta_keys(delta, spec.d_model),
        **kinds_key(spec),
        "partial_rotary_factor": (heads.rope_dims or width) / width,
        "attention_bias": heads.qkv_bias,
    }


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    delta = only_mixer(spec, GatedDeltaSpec)
    (d_k, _), apart = delta.widths(spec.d_model), by_key_head(delta, spec.d_model)
    keys = delta.key_heads * d_k

    def write(ours: list[torch.Tensor]) -> list[torch.Tensor]:
        *qkv, z = apart[0].write(ours)
        return [torch.cat(qkv), z]

    def read(theirs: list[torch.Tensor], shapes: list[torch.Size]) -> list[torch.Tensor]:
        qkv, z = theirs
        return apart[0].read([*qkv.split([keys, keys, len(qkv) - 2 * keys]), z], shapes)

    rules = [
        Rule(
            "blocks.#.mixer.in_proj_qkvz.@",
            [f"{MIX}in_proj_{part}.@" for part in ("qkv", "z")],
            Form(write, read),
        ),
        Rule("blocks.#.mixer.in_proj_ba.@", [f"{MIX}in_proj_{x}.@" for x in "ba"], apart[1]),
    ]
    return [[*rules, *renamed(NAMES | llama.TRUNK | llama.GATED)]]


QWEN3_5 = register(
    Family(
        "qwen3_5_text",
        _spec,
        _layouts,
        _keys,
        ignored=(*llama.ROTARY_BUFFERS, *DRAFT),
        tied=llama.TIED,
        canonical=canonical,
    )
)
