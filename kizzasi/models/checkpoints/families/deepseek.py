"""DeepSeek-V3, as transformers stores it: latent attention, and mixtures that balance by a bias.

The layers that predict further tokens, stored behind the last one, are not read. Their program
pairs the entries of a rotary key as (2i, 2i + 1), as ours does; `rope_interleave` false is refused.

Differs: a config does not say how fast the biases move in training; it is read as 0.001, as in the
paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.mixtures import mixtures_of, one_by_one, stacked
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes, count_values
from kizzasi.models.mixers.mla import MLASpec
from kizzasi.models.spec import BlockSpec, ModelSpec

BIAS_RATE = 1e-3
MLP = llama.LAYER + "mlp."
PARTS = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm")
NAMES = {
    **llama.TRUNK,
    **llama.GATED,
    **{
        f"blocks.#.mixer.{part}.@": f"{llama.LAYER}self_attn.{part}.@"
        for part in (*PARTS, "kv_b_proj")
    },
    **{
        f"blocks.#.channel.shared_expert.{part}.@": f"{MLP}shared_experts.{part}.@"
        for part in ("gate_proj", "up_proj", "down_proj")
    },
    "blocks.#.channel.gate.bias": f"{MLP}gate.e_score_correction_bias",
    "blocks.#.channel.gate.weight": f"{MLP}gate.weight",
}
STRETCH = {"factor": "factor", "original_context": "original_max_position_embeddings"}
STRETCH |= {key: key for key in ("beta_fast", "beta_slow", "attention_factor")}


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    return [
        [*renamed(NAMES), *one_by_one(spec, MLP)],
        renamed(NAMES | stacked(MLP)),
    ]


def sharpening(factor: float, weight: float) -> float:
    """What yarn multiplies with: 0.1 weight ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _rope(config: Config, width: int) -> dict[str, Any]:
    """Base, stretch, and the scale of the scores, of heads of this width."""
    theta = config.get("rope_theta", float, 1e4)
    context = config.get("max_position_embeddings", int, None)
    old, new = config.within("rope_scaling"), config.within("rope_parameters")
    keys = old or new
    if keys is None:
        return {"rope_theta": theta}
    theta = keys.get("rope_theta", float, theta)
    kind = keys.get("rope_type", str, keys.get("type", str, "default"))
    keys.only("partial_rotary_factor", 1.0)
    keys.only("truncate", True)
    if kind == "default":
        keys.finish()
        return {"rope_theta": theta}
    if kind != "yarn":
        keys.refuse("rope_type", f"{kind!r:.40} is not supported; only default and yarn are")
    fields = {ours: keys.get(key, object, None) for ours, key in STRETCH.items()}
    fields["original_context"] = fields["original_context"] or context
    given = {name: value for name, value in fields.items() if value is not None}
    scaling = RopeScaling.from_dict({"method": "yarn", **given}, f"{keys.prefix}rope_type")
    part, whole = (keys.get(key, float, 0.0) for key in ("mscale", "mscale_all_dim"))
    keys.finish()
    if part and whole and scaling.attention_factor is None:
        ratio = sharpening(scaling.factor, part) / sharpening(scaling.factor, whole)
        scaling = replace(scaling, attention_factor=ratio)
    scale = width**-0.5 * sharpening(scaling.factor, whole) ** 2 if whole else None
    return {"rope_theta": theta, "rope_scaling": scaling, "scale": scale}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    n_heads = config.get("num_attention_heads", int)
    config.only("num_key_value_heads", n_heads)
    config.only("attention_bias", False)
    config.only("rope_interleave", True)
    nope, rope = (config.get(f"qk_{part}_head_dim", int) for part in ("nope", "rope"))
    config.only("qk_head_dim", nope + rope)
    config.only("head_dim", rope)
    config.skip("num_nextn_predict_layers", "num_mtp_layers")  # not read: see above
    config.skip("pretraining_tp", "ep_size", "moe_layer_freq", "seq_aux", "aux_loss_alpha")
    config.only("topk_method", "noaux_tc")
    config.only("scoring_func", "sigmoid")
    mixer = MLASpec(
        n_heads=n_heads,
        kv_lora_rank=config.get("kv_lora_rank", int),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=config.get("v_head_dim", int),
        q_lora_rank=config.get("q_lora_rank", int, None),
        **_rope(config, nope + rope),
    )
    dense = llama.swiglu(config)
    first = config.get("first_k_dense_replace", int, 3)
    mixture = mixture_of(config, shapes, max(1, n_layers - first))
    channels = [dense if i < first else mixture for i in range(n_layers)]
    return llama.trunk(config, [BlockSpec(mixer, channel) for channel in channels])


def mixture_of(config: Config, shapes: Shapes, n_mixtures: int) -> MoESpec:
    """Experts chosen by a sigmoid and a bias, beside one that always works."""
    most = count_values(shapes) // n_mixtures
    old, new = (config.get(key, int, None) for key in ("n_routed_experts", "num_local_experts"))
    count = old or new or 256
    if not 1 <= count <= most or (None not in (old, new) and old != new):
        config.refuse("n_routed_experts", f"{count} cannot be: the tensors allow 1 to {most}")
    config.skip("output_router_logits")  # of the output only
    hidden = config.get("moe_intermediate_size", int)
    norm = config.get("norm_topk_prob", bool, True)
    router = TopK(
        score="sigmoid",
        scale=config.get("routed_scaling_factor", float, 2.5),
        bias_rate=BIAS_RATE,
        n_groups=config.get("n_group", int, 8),
        top_groups=config.get("topk_group", int, 4),
        group_best=2,
    )
    return MoESpec(
        n_experts=count,
        top_k=config.get("num_experts_per_tok", int, 8),
        hidden=hidden,
        router=router,
        normalize="topk" if norm else "none",
        shared_hidden=hidden * config.get("n_shared_experts", int, 1),
        balance_weight=0.0,
        z_loss_weight=0.0,
    )


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mixer, mixture = spec.plain_blocks[0].mixer, mixtures_of(spec)[0]
    if not isinstance(mixer, MLASpec) or not isinstance(mixture.router, TopK):
        raise SpecError("blocks[0].mixer: the format knows mla, and mixtures of the router top_k")
    dense = [isinstance(block.channel, SwiGLUSpec) for block in spec.plain_blocks]
    hidden = mixture.hidden or 1
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": llama.vocabulary(spec).vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "intermediate_size": llama.width(spec),
        "moe_intermediate_size": hidden,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_heads,
        **{
            key: getattr(mixer, key)
            for key in ("kv_lora_rank", "q_lora_rank", "v_head_dim")
            + ("qk_nope_head_dim", "qk_rope_head_dim")
        },
        "first_k_dense_replace": sum(dense),
        "n_routed_experts": mixture.n_experts,
        "n_shared_experts": mixture.shared_hidden // hidden,
        "num_experts_per_tok": mixture.top_k,
        "routed_scaling_factor": mixture.router.scale,
        "n_group": mixture.router.n_groups,
        "topk_group": mixture.router.top_groups,
        "norm_topk_prob": mixture.normalize == "topk",
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_head,
        "rope_interleave": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **_rope_keys(mixer),
    }


def _rope_keys(mixer: MLASpec) -> dict[str, Any]:
    scaling, keys = mixer.rope_scaling, {"rope_theta": mixer.rope_theta}
    if scaling is None or scaling.method != "yarn":
        return {**keys, "rope_scaling": None}
    given = {key: getattr(scaling, ours) for ours, key in STRETCH.items()}
    said = {key: value for key, value in given.items() if value is not None}
    if mixer.scale is not None and scaling.factor > 1:
        whole = math.sqrt(mixer.scale * mixer.qk_head_dim**0.5)
        said["mscale_all_dim"] = float(f"{(whole - 1) / (0.1 * math.log(scaling.factor)):.9g}")
    context = round(scaling.factor * (scaling.original_context or 1))
    more = {"max_position_embeddings": context}
    return {**keys, **more, "rope_scaling": {"rope_type": "yarn", **said}}


def canonical(spec: ModelSpec) -> ModelSpec:
    """Llama's; how fast biases move is not said."""
    spec, blocks = llama.canonical(spec), []
    for block in spec.plain_blocks:
        channel = block.channel
        if isinstance(channel, MoESpec) and isinstance(channel.router, TopK):
            router = channel.router
            if router.bias_rate > 0:
                router = replace(router, bias_rate=BIAS_RATE)
            channel = replace(channel, router=router)
        blocks.append(replace(block, channel=channel))
    return spec.replace(blocks=tuple(blocks))


DEEPSEEK_V3 = register(
    Family(
        "deepseek_v3",
        _spec,
        _layouts,
        _keys,
        ignored=llama.ROTARY_BUFFERS,
        tied=llama.TIED,
        canonical=canonical,
        surplus=f"{llama.LAYER}",
    )
)
