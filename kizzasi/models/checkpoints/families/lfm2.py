"""LFM2, as transformers stores it: gated short convolutions, and attention in some layers.

A config may give the channels' width before it is cut and rounded; what is built follows, and is
written as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kizzasi.models.channels.moe import PARTS
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.jamba import attention_keys
from kizzasi.models.checkpoints.families.mamba_hf import only_mixer
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.short_conv import ShortConvSpec
from kizzasi.models.spec import BlockSpec, ModelSpec

LAYER, EPS = llama.LAYER, "norm_eps"
NAMES = {
    **{ours: name for ours, name in llama.TRUNK.items() if ".mixer." not in ours},
    "norm.@": "model.embedding_norm.@",
    "blocks.#.mixer_norm.@": LAYER + "operator_norm.@",
    "blocks.#.channel_norm.@": LAYER + "ffn_norm.@",
    **{f"blocks.#.mixer.{x}_proj.@": f"{LAYER}self_attn.{x}_proj.@" for x in "qkv"},
    "blocks.#.mixer.o_proj.@": LAYER + "self_attn.out_proj.@",
    **{f"blocks.#.mixer.{x}_norm.@": f"{LAYER}self_attn.{x}_layernorm.@" for x in "qk"},
    **{f"blocks.#.mixer.{x}.@": f"{LAYER}conv.{x}.@" for x in ("in_proj", "conv", "out_proj")},
    **{
        f"blocks.#.channel.{ours}.@": f"{LAYER}feed_forward.{theirs}.@"
        for ours, theirs in zip(PARTS, ("w1", "w3", "w2"), strict=True)
    },
}


def _width(config: Config) -> int:
    """Of a channel, cut to two thirds and rounded up unless the config says that it is given."""
    width = config.get("block_ff_dim", int, config.get("intermediate_size", int, 12288))
    multiple = config.get("block_multiple_of", int, 256)
    factor = config.get("block_ffn_dim_multiplier", float, 1.0, null=None)
    if not config.get("block_auto_adjust_ff_dim", bool, True):
        return width
    if multiple < 1:
        config.refuse("block_multiple_of", f"{multiple} is below 1")
    width = int(2 * width / 3)
    return width if factor is None else -(-int(factor * width) // multiple) * multiple


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    attends = config.get("full_attn_idxs", tuple[int, ...], tuple(range(n_layers)))
    usual = ["full_attention" if i in attends else "conv" for i in range(n_layers)]
    heads = llama.attention(config, n_kv_heads=8, theta=1e6)
    heads = replace(heads, qk_norm=True, qk_norm_eps=config.get(EPS, float, 1e-5))
    d_conv, bias = config.get("conv_L_cache", int, 3), config.get("conv_bias", bool, False)
    table = {"full_attention": heads, "conv": ShortConvSpec(d_conv=d_conv, bias=bias)}
    mixers = llama.layer_kinds(config, n_layers, usual, table)
    channel = SwiGLUSpec(_width(config))
    tied = config.get("tie_embedding", bool, True)
    for key in ("block_use_swiglu", "use_pos_enc"):
        config.only(key, True)
    config.skip("num_heads", "theta", *(f"{part}dim" for part in ("block_", "conv_")))  # said twice
    config.skip("conv_dim_out", "block_norm_eps")  # transformers never reads them
    config.skip("block_mlp_init_scale", "block_out_init_scale")  # of fresh weights
    config.skip("block_use_xavier_init", "conv_use_xavier_init")
    blocks = [BlockSpec(mixer, channel) for mixer in mixers]
    return llama.trunk(config, blocks, 1e-5, key=EPS, tied=tied)


def _keys(spec: ModelSpec) -> dict[str, Any]:
    keys, conv = attention_keys(spec), only_mixer(spec, ShortConvSpec)
    eps, _ = keys.pop("rms_norm_eps"), keys.pop("hidden_act")
    attends = [isinstance(block.mixer, AttentionSpec) for block in spec.plain_blocks]
    return {
        **keys,
        EPS: eps,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": conv.d_conv,
        "conv_bias": conv.bias,
        "layer_types": ["full_attention" if here else "conv" for here in attends],
    }


LFM2 = llama.dialect("lfm2", "Lfm2ForCausalLM", _spec, _keys, lambda _: [renamed(NAMES)])
