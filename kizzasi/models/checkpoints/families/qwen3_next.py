"""Qwen3-Next, as transformers stores it: Gated DeltaNet, gated attention, and a mixture of experts
with a gated shared expert. Every norm but the delta layers' own multiplies with 1 + w.

The draft head for further tokens (mtp.*) that published files carry is not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.channels.moe import PARTS
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama, mixtures
from kizzasi.models.checkpoints.families.jamba import attention_keys
from kizzasi.models.checkpoints.families.mamba_hf import canonical as plain
from kizzasi.models.checkpoints.families.mamba_hf import only_mixer
from kizzasi.models.checkpoints.foreign import Family, register
from kizzasi.models.checkpoints.names import Form, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.gated_delta import GatedDeltaSpec
from kizzasi.models.spec import BlockSpec, ModelSpec

LAYER = llama.LAYER
USUAL = {
    **{"linear_num_value_heads": 32, "linear_num_key_heads": 16},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}
KINDS = {"linear_attention": False, "full_attention": True}
OWN = {
    "blocks.#.mixer.@": LAYER + "linear_attn.@",
    **{
        f"blocks.#.mixer.{part}.@": f"{LAYER}linear_attn.{part}.@"
        for part in ("in_proj_qkvz", "in_proj_ba", "conv1d", "norm", "out_proj")
    },
    **{
        f"blocks.#.channel.shared_expert.{part}.@": f"{LAYER}mlp.shared_expert.{part}.@"
        for part in PARTS
    },
    "blocks.#.channel.shared_expert_gate.@": LAYER + "mlp.shared_expert_gate.@",
}
DRAFT_LAYER = (
    *("input_layernorm", "post_attention_layernorm"),
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *("mlp.gate", "mlp.shared_expert_gate"),
    *(f"mlp.{expert}.{part}" for expert in ("experts.#", "shared_expert") for part in PARTS),
)
DRAFT = (
    *("mtp.fc.weight", "mtp.norm.weight"),
    *("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"),
    *(f"mtp.layers.#.{part}.weight" for part in DRAFT_LAYER),
)


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    attends = attending(config, n_layers)
    heads = llama.attention(config, n_kv_heads=2, head_dim=256, rotated=0.25)
    heads = replace(llama.normalised(heads, config), qk_norm_kind="rms_plus_one", gate=True)
    delta = delta_of(config, config.get("rms_norm_eps", float, 1e-6), **USUAL)
    mixed = mixtures.mixed_layers(config, n_layers)
    sparse = replace(
        mixtures.read_mixture(
            config,
            shapes,
            sum(mixed),
            hidden=config.get("moe_intermediate_size", int, 512),
            experts=512,
            top_k=10,
        ),
        normalize="topk" if config.get("norm_topk_prob", bool, True) else "all",
        shared_hidden=config.get("shared_expert_intermediate_size", int, 512),
        shared_gate=True,
    )
    dense = llama.swiglu(config)
    blocks = [
        BlockSpec(heads if attend else delta, sparse if mix else dense, norm="rms_plus_one")
        for attend, mix in zip(attends, mixed, strict=True)
    ]
    return llama.trunk(config, blocks)


def by_key_head(delta: GatedDeltaSpec, d_model: int) -> tuple[Form, Form]:
    """Forms for those who store the parts of in_proj_qkvz apart, (q, k, v, z), and of in_proj_ba,
    (b, a): here the rows of all are grouped by key head."""
    n, r = delta.key_heads, delta.n_heads // delta.key_heads
    d_k, d_v = delta.widths(d_model)

    def form(*sizes: int) -> Form:
        def write(ours: list[Tensor]) -> list[Tensor]:
            return [t.flatten(0, 1) for t in ours[0].unflatten(0, (n, -1)).split(sizes, 1)]

        def read(theirs: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
            return [torch.cat([t.unflatten(0, (n, -1)) for t in theirs], 1).flatten(0, 1)]

        return Form(write, read)

    return form(d_k, d_k, r * d_v, r * d_v), form(r, r)


def delta_of(config: Config, eps: float, **usual: int) -> GatedDeltaSpec:
    """The delta layers; `usual` are numbers that silence means, by the config's names."""
    numbers = {key: config.get(key, int, value) for key, value in usual.items()}
    return GatedDeltaSpec(
        n_heads=numbers["linear_num_value_heads"],
        n_key_heads=numbers["linear_num_key_heads"],
        key_head_dim=numbers["linear_key_head_dim"],
        value_head_dim=numbers["linear_value_head_dim"],
        d_conv=config.get("linear_conv_kernel_dim", int, 4),
        norm_eps=eps,
    )


def delta_keys(delta: GatedDeltaSpec, d_model: int) -> dict[str, Any]:
    """What `delta_of` reads."""
    d_k, d_v = delta.widths(d_model)
    return {
        "linear_num_value_heads": delta.n_heads,
        "linear_num_key_heads": delta.key_heads,
        "linear_key_head_dim": d_k,
        "linear_value_head_dim": d_v,
        "linear_conv_kernel_dim": delta.d_conv,
    }


def kinds_key(spec: ModelSpec) -> dict[str, list[str]]:
    """`layer_types`: which layers attend."""
    attends = [isinstance(block.mixer, AttentionSpec) for block in spec.plain_blocks]
    return {"layer_types": ["full_attention" if a else "linear_attention" for a in attends]}


def attending(config: Config, n_layers: int) -> list[bool]:
    """`layer_types` decides, or every so many layers attend."""
    every = config.get("full_attention_interval", int, 4)
    if every < 1:
        config.refuse("full_attention_interval", f"{every} is below 1")
    usual = tuple(
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(n_layers)
    )
    return llama.layer_kinds(config, n_layers, usual, KINDS)


def _keys(spec: ModelSpec) -> dict[str, Any]:
    delta, heads = only_mixer(spec, GatedDeltaSpec), only_mixer(spec, AttentionSpec)
    mixture, width = mixtures.mixtures_of(spec)[0], heads.width(spec.d_model)
    if not mixture.shared_gate:
        raise SpecError("shared_gate: the format needs a gated shared expert")
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **attention_keys(spec),
        **mixtures.sparse_keys(spec),
        "shared_expert_intermediate_size": mixture.shared_hidden,
        **kinds_key(spec),
        "partial_rotary_factor": (heads.rope_dims or width) / width,
        "attention_bias": heads.qkv_bias,
        **delta_keys(delta, spec.d_model),
    }


def canonical(spec: ModelSpec) -> ModelSpec:
    spec, blocks = plain(spec), []
    for block in spec.plain_blocks:
        mixer = block.mixer
        if isinstance(mixer, GatedDeltaSpec):
            d_k, d_v = mixer.widths(spec.d_model)
            mixer = replace(
                mixer, n_key_heads=mixer.key_heads, key_head_dim=d_k, value_head_dim=d_v
            )
        blocks.append(replace(block, mixer=mixer))
    return spec.replace(blocks=tuple(blocks))


QWEN3_NEXT = register(
    Family(
        "qwen3_next",
        _spec,
        lambda spec: [[*renamed(OWN), *rules] for rules in mixtures.like_qwen(spec)],
        _keys,
        ignored=(*llama.ROTARY_BUFFERS, *DRAFT),
        tied=llama.TIED,
        canonical=canonical,
    )
)
