"""RecurrentGemma (Griffin), as transformers stores it: gated leaky memories, and windows in some
layers. Norms multiply with 1 + w; the embeddings' factor is sqrt(d_model) in bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from kizzasi.models.channels.moe import PARTS
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.jamba import attention_keys
from kizzasi.models.checkpoints.families.mamba_hf import d_model_of, only_mixer
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.rg_lru import RGLRUSpec
from kizzasi.models.spec import BlockSpec, ModelSpec

LAYER = llama.LAYER
MIX = LAYER + "temporal_block."
GATES = ("input_gate", "recurrent_gate")
KINDS = {"recurrent": False, "attention": True}
NAMES = {
    **llama.TRUNK,
    "norm.@": "model.final_norm.@",
    "blocks.#.mixer_norm.@": LAYER + "temporal_pre_norm.@",
    "blocks.#.channel_norm.@": LAYER + "channel_pre_norm.@",
    **{f"blocks.#.mixer.{x}_proj.@": f"{MIX}{x}_proj.@" for x in "qkvo"},
    **{f"blocks.#.mixer.linear_{x}.@": f"{MIX}linear_{x}.@" for x in ("x", "y", "out")},
    "blocks.#.mixer.conv_1d.@": MIX + "conv_1d.@",
    "blocks.#.mixer.Lambda": MIX + "rg_lru.recurrent_param",
    **{f"blocks.#.mixer.{gate}.@": f"{MIX}rg_lru.{gate}_@" for gate in GATES},
    **{f"blocks.#.channel.{part}.@": f"{LAYER}mlp_block.{part}.@" for part in PARTS},
}


def _scale(d_model: int) -> float:
    return torch.tensor(math.sqrt(d_model), dtype=torch.bfloat16).item()


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers, d_model = llama.depth(config, shapes), d_model_of(config, shapes)
    kinds = config.get("block_types", tuple[str, ...], ("recurrent", "recurrent", "attention"))
    if not kinds or not set(kinds) <= KINDS.keys():
        config.refuse("block_types", f"{list(kinds)!r:.80} are not of {list(KINDS)}")
    heads = replace(
        llama.attention(config, rotated=0.5),
        qkv_bias=config.get("attention_bias", bool, False),
        out_bias=True,
        window=config.get("attention_window_size", int, 2048),
    )
    width = config.get("lru_width", int, d_model)
    conv = config.get("conv1d_width", int, 4)
    memory = RGLRUSpec(heads.n_heads, expand=width / d_model, d_conv=conv)
    config.only("hidden_activation", "gelu_pytorch_tanh")
    config.skip("w_init_variance_scale", "final_w_init_variance_scale")  # of fresh weights
    hidden = config.get("intermediate_size", int, 7680) // 2
    channel = SwiGLUSpec(hidden, bias=True, activation="gelu_tanh")
    blocks = [
        BlockSpec(heads if KINDS[kinds[i % len(kinds)]] else memory, channel, "rms_plus_one")
        for i in range(n_layers)
    ]
    return llama.trunk(config, blocks, tied=True).replace(
        embed_scale=_scale(d_model), logit_cap=config.get("logits_soft_cap", float, 30.0)
    )


def _keys(spec: ModelSpec) -> dict[str, Any]:
    keys, heads = attention_keys(spec), only_mixer(spec, AttentionSpec)
    memory, width = only_mixer(spec, RGLRUSpec), heads.width(spec.d_model)
    attends = [isinstance(block.mixer, AttentionSpec) for block in spec.plain_blocks]
    del keys["head_dim"], keys["hidden_act"]
    return {
        **keys,
        "intermediate_size": 2 * llama.width(spec),
        "partial_rotary_factor": (heads.rope_dims or width) / width,
        "attention_bias": heads.qkv_bias,
        "attention_window_size": heads.window,
        "lru_width": memory.d_rnn(spec.d_model),
        "conv1d_width": memory.d_conv,
        "logits_soft_cap": spec.logit_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        "block_types": ["attention" if here else "recurrent" for here in attends],
    }


RECURRENT_GEMMA = llama.dialect(
    "recurrent_gemma", "RecurrentGemmaForCausalLM", _spec, _keys, lambda _: [renamed(NAMES)]
)
