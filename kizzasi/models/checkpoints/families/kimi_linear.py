"""Kimi Linear, as it was published and as transformers stores it: Kimi delta attention, latent
attention without positions, and mixtures that balance by a bias.

Layers are counted from 1 in `linear_attn_config`. Dense channels are named mlp.*, and in files of
transformers 5.24 block_sparse_moe.*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models.channels.moe import PARTS, MoESpec
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.experts import MIXTRAL
from kizzasi.models.checkpoints.families import deepseek, llama
from kizzasi.models.checkpoints.families.mamba_hf import only_mixer
from kizzasi.models.checkpoints.families.mixtures import mixtures_of, one_by_one
from kizzasi.models.checkpoints.families.qwen3_next import KINDS
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import Rule, renamed, reshaped
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.kda import KDASpec
from kizzasi.models.mixers.mla import MLASpec
from kizzasi.models.spec import BlockSpec, ModelSpec

MIX, SPARSE = llama.LAYER + "self_attn.", llama.LAYER + "block_sparse_moe."
DELTA = (
    *(f"{x}_{part}" for x in "qkv" for part in ("proj", "conv1d")),
    *("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "o_norm", "o_proj"),
)
OURS = "blocks.#.channel."
NAMES = {
    **llama.TRUNK,
    **{f"blocks.#.mixer.{part}.@": f"{MIX}{part}.@" for part in (*DELTA, *deepseek.PARTS)},
    "blocks.#.mixer.kv_b_proj.@": MIX + "kv_b_proj.@",
    "blocks.#.mixer.dt_bias": MIX + "dt_bias",
    **{f"{OURS}shared_expert.{part}.@": f"{SPARSE}shared_experts.{part}.@" for part in PARTS},
    OURS + "gate.bias": SPARSE + "gate.e_score_correction_bias",
    OURS + "gate.weight": SPARSE + "gate.weight",
}
DECAY = Rule("blocks.#.mixer.A_log", MIX + "A_log", reshaped(1, 1, -1, 1))
EXPERTS = {  # what DeepSeek's config says, and the two names for it here
    "n_routed_experts": ("num_experts", "num_local_experts", int, 256),
    "num_experts_per_tok": ("num_experts_per_token", "num_experts_per_tok", int, 8),
    "n_shared_experts": ("num_shared_experts", "n_shared_experts", int, 1),
    "norm_topk_prob": ("moe_renormalize", "norm_topk_prob", bool, True),
    "n_group": ("num_expert_group", "n_group", int, 1),
    "topk_group": ("topk_group", "topk_group", int, 1),
    "routed_scaling_factor": ("routed_scaling_factor", "routed_scaling_factor", float, 2.446),
    "moe_intermediate_size": ("moe_intermediate_size", "moe_intermediate_size", int, 1024),
}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    n_heads = config.get("num_attention_heads", int, 32)
    config.only("num_key_value_heads", n_heads)
    config.only("attention_bias", False)
    for key in ("mla_use_nope", "use_grouped_topk"):
        config.only(key, True)
    config.only("moe_router_activation_func", "sigmoid")
    config.only("moe_layer_freq", 1)
    config.skip("qk_head_dim", "head_dim", "pretraining_tp", "output_router_logits")  # said twice
    config.skip("model_max_length", "max_position_embeddings", "num_nextn_predict_layers")
    config.skip("rope_theta", "rope_scaling", "rope_parameters")  # of no use: no positions
    heads = MLASpec(
        n_heads=n_heads,
        kv_lora_rank=config.get("kv_lora_rank", int, 512),
        qk_nope_head_dim=config.get("qk_nope_head_dim", int, 128),
        qk_rope_head_dim=config.get("qk_rope_head_dim", int, 64),
        v_head_dim=config.get("v_head_dim", int, 128),
        q_lora_rank=config.get("q_lora_rank", int, None),
        position="none",
    )
    mixers = _mixers(config, n_layers, heads)
    words = {}
    for theirs, (name, other, kind, usual) in EXPERTS.items():
        words[theirs] = config.get(name, kind, config.get(other, kind, usual))
    first = config.get("first_k_dense_replace", int, 1)
    usual = ["dense" if i < first else "sparse" for i in range(n_layers)]
    kinds = config.get("mlp_layer_types", tuple[str, ...], tuple(usual))
    if len(kinds) != n_layers or not {*kinds} <= {"dense", "sparse"}:
        config.refuse("mlp_layer_types", f"{list(kinds)!r:.80} are not {n_layers} of dense, sparse")
    inner, dense = Config(words, config.where), llama.swiglu(config)
    sparse = deepseek.mixture_of(inner, shapes, max(1, kinds.count("sparse")))
    channels = [dense if kind == "dense" else sparse for kind in kinds]
    blocks = [BlockSpec(m, c) for m, c in zip(mixers, channels, strict=True)]
    return llama.trunk(config, blocks, 1e-5)


def _mixers(config: Config, n_layers: int, heads: MLASpec) -> list[MLASpec | KDASpec]:
    usual = [i > 0 and i % 4 == 0 for i in range(n_layers)]
    n, width, taps = (
        config.get(f"linear_{key}", int, value)
        for key, value in (("num_heads", 32), ("head_dim", 128), ("conv_kernel_dim", 4))
    )
    older = config.within("linear_attn_config")
    if older is not None:
        n, width = older.get("num_heads", int, n), older.get("head_dim", int, width)
        taps = older.get("short_conv_kernel_size", int, taps)
        attends = {*older.get("full_attn_layers", tuple[int, ...], ())}
        deltas = {*older.get("kda_layers", tuple[int, ...], ())}
        if attends | deltas:
            if attends & deltas or attends | deltas != {*range(1, n_layers + 1)}:
                older.refuse("kda_layers", f"with full_attn_layers not 1 to {n_layers} once each")
            usual = [i + 1 in attends for i in range(n_layers)]
        older.finish()
    kinds = ["full_attention" if attend else "linear_attention" for attend in usual]
    delta = KDASpec(n, head_dim=width, d_conv=taps, norm_eps=config.get(llama.EPS, float, 1e-5))
    attends = llama.layer_kinds(config, n_layers, kinds, KINDS)
    return [heads if attend else delta for attend in attends]


def _keys(spec: ModelSpec) -> dict[str, Any]:
    heads, delta, mixture = (
        only_mixer(spec, MLASpec),
        only_mixer(spec, KDASpec),
        mixtures_of(spec)[0],
    )
    if not isinstance(mixture.router, TopK) or mixture.hidden is None:
        raise SpecError("the format knows mixtures of equal experts with the router top_k")
    blocks = spec.plain_blocks
    ranks = ("kv_lora_rank", "q_lora_rank", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim")
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "vocab_size": llama.vocabulary(spec).vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(blocks),
        "intermediate_size": llama.width(spec),
        "num_attention_heads": heads.n_heads,
        "num_key_value_heads": heads.n_heads,
        **{key: getattr(heads, key) for key in ranks},
        "layer_types": [
            "full_attention" if isinstance(b.mixer, MLASpec) else "linear_attention" for b in blocks
        ],
        "mlp_layer_types": [
            "sparse" if isinstance(b.channel, MoESpec) else "dense" for b in blocks
        ],
        "linear_num_heads": delta.n_heads,
        "linear_head_dim": delta.width(spec.d_model),
        "linear_conv_kernel_dim": delta.d_conv,
        "moe_intermediate_size": mixture.hidden,
        "num_experts": mixture.n_experts,
        "num_experts_per_token": mixture.top_k,
        "num_shared_experts": mixture.shared_hidden // mixture.hidden,
        "moe_renormalize": mixture.normalize == "topk",
        "num_expert_group": mixture.router.n_groups,
        "topk_group": mixture.router.top_groups,
        "routed_scaling_factor": mixture.router.scale,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_head,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    each = one_by_one(spec, SPARSE, MIXTRAL)
    later = {f"{OURS}{part}.@": f"{SPARSE}{part}.@" for part in PARTS}
    return [[DECAY, *renamed(NAMES | dense), *each] for dense in (llama.GATED, later)]


KIMI_LINEAR = register(
    Family(
        "kimi_linear",
        _spec,
        _layouts,
        _keys,
        tied=llama.TIED,
        canonical=deepseek.canonical,
    )
)
