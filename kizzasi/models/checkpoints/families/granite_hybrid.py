"""Granite 4, as transformers stores it (granitemoehybrid): Mamba-2 and attention, with Granite's
factors, and mixtures beside a shared expert, or this alone.

Gates and ups of experts are one matrix there; `position_embedding_type` null means no positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kizzasi.models.channels.moe import PARTS, MoESpec
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama, mixtures
from kizzasi.models.checkpoints.families.bamba import KINDS, mamba_keys, mamba_of
from kizzasi.models.checkpoints.families.jamba import attention_keys
from kizzasi.models.checkpoints.families.mamba_hf import (
    d_model_of,
    mixer_names,
    only_mixer,
    without_steps,
)
from kizzasi.models.checkpoints.families.qwen3_next import kinds_key
from kizzasi.models.checkpoints.families.sandwich import scale_keys, scaled
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import CONCATENATED, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.spec import BlockSpec, ModelSpec

SPARSE, SHARED = llama.LAYER + "block_sparse_moe.", llama.LAYER + "shared_mlp."
OURS = "blocks.#.channel."
NAMES = {
    **llama.TRUNK,
    **mixer_names(llama.LAYER + "mamba"),
    OURS + "gate.weight": SPARSE + "router.layer.weight",
    OURS + "experts.gate_up_proj": SPARSE + "input_linear.weight",
    OURS + "experts.down_proj": SPARSE + "output_linear.weight",
    OURS + "shared_expert.down_proj.@": SHARED + "output_linear.@",
    OURS + "down_proj.@": SHARED + "output_linear.@",
}
JOINED = [
    Rule([f"{OURS}{where}{part}.@" for part in PARTS[:2]], SHARED + "input_linear.@", CONCATENATED)
    for where in ("", "shared_expert.")
]


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    key = "layer_types" if config.data.get("layer_types") else "layers_block_type"
    said = Config({"layer_types": config.data.get(key)}, config.where)
    attends = llama.layer_kinds(said, n_layers, ["linear_attention"] * n_layers, KINDS)
    config.skip("layer_types", "layers_block_type")
    bias = config.get("attention_bias", bool, False)
    scale = config.get("attention_multiplier", float, 1.0)
    heads = replace(llama.attention(config), qkv_bias=bias, out_bias=bias, scale=scale)
    config.only("position_embedding_type", "rope", "nope")
    if config.data.get("position_embedding_type") != "rope":
        heads = replace(heads, position="none", rope_theta=1e4, rope_scaling=None)
    mamba = replace(
        mamba_of(config, d_model_of(config, shapes)),
        norm_eps=config.get("rms_norm_eps", float, 1e-6),
    )
    hidden = config.get("intermediate_size", int, 11008)
    wide = config.get("shared_intermediate_size", int, 1024)
    channel: SwiGLUSpec | MoESpec = SwiGLUSpec(wide)
    if config.get("num_local_experts", int, 8) > 0:
        channel = mixtures.read_mixture(config, shapes, n_layers, hidden=hidden, experts=8, top_k=2)
        channel = replace(channel, shared_hidden=wide)
    config.only("hidden_act", "silu")
    config.only("normalization_function", "rmsnorm")
    config.skip(
        "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits", "init_method"
    )
    blocks = [BlockSpec(heads if attend else mamba, channel) for attend in attends]
    return scaled(config, llama.trunk(config, blocks))


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mamba, heads = only_mixer(spec, Mamba2Spec), only_mixer(spec, AttentionSpec)
    channel = spec.plain_blocks[0].channel
    more: dict[str, Any] = {"num_local_experts": 0, "shared_intermediate_size": llama.width(spec)}
    if isinstance(channel, MoESpec):
        more = {
            **mixtures.mixture_keys(spec),
            "num_local_experts": channel.n_experts,
            "intermediate_size": mixtures.expert_width(spec),
            "shared_intermediate_size": channel.shared_hidden,
        }
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        **attention_keys(spec),
        **more,
        **mamba_keys(mamba, spec.d_model),
        **kinds_key(spec),
        **scale_keys(spec),
        "attention_bias": heads.qkv_bias,
        "attention_multiplier": heads.scale,
        "position_embedding_type": "rope" if heads.position == "rope" else None,
    }


def _layouts(_: ModelSpec) -> Sequence[Rules]:
    return [[*JOINED, *renamed(NAMES)]]


GRANITE_HYBRID = register(
    Family(
        "granitemoehybrid",
        _spec,
        _layouts,
        _keys,
        ignored=llama.ROTARY_BUFFERS,
        tied=llama.TIED,
        canonical=without_steps,
    )
)
