"""Nemotron-H, as transformers stores it: Mamba-2, attention without positions, perceptrons with
squared ReLU, and mixtures of such, each in a layer of its own.

A layer of ours holds a mixer and the channel behind it: two of theirs, or one. So a channel behind
another, or one at the start, is refused. Layers that predict further tokens (mtp.*) are not read.

Differs: steps are bounded by `time_step_limit`, as in the authors' program; transformers 5.24
bounds them by `time_step_min` from below, in prefill and not in decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.deepseek import BIAS_RATE
from kizzasi.models.checkpoints.families.deepseek import canonical as rated
from kizzasi.models.checkpoints.families.gpt_oss import rows_of_router
from kizzasi.models.checkpoints.families.mamba_hf import (
    PARTS,
    STEPS,
    canonical,
    only_mixer,
    step_limit,
    step_limit_key,
)
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes, count_values
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.spec import BlockSpec, ModelSpec

LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
ENDS = {
    "stem.embedding.@": "backbone.embeddings.@",
    "stem.lm_head.@": "lm_head.@",
    "norm.@": "backbone.norm_f.@",
}


def _kinds(config: Config, shapes: Shapes) -> list[str]:
    text = config.get("hybrid_override_pattern", str, None)
    kinds = [LETTERS.get(letter, letter) for letter in text or "ME*-"]
    for key in ("layers_block_type", "layer_types"):
        said = config.get(key, tuple[str, ...], None)
        kinds = kinds if said is None else [OLDER.get(kind, kind) for kind in said]
    if not 1 <= len(kinds) <= len(shapes) or not set(kinds) <= {*LETTERS.values()}:
        config.refuse("layers_block_type", f"{kinds!r:.80} are not of {[*LETTERS.values()]}")
    config.only("num_hidden_layers", len(kinds))
    return kinds


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    kinds = _kinds(config, shapes)
    parts: dict[str, Any] = {"full_attention": _heads(config), "linear_attention": _mamba(config)}
    mixture = _mixture(config, shapes, max(1, kinds.count("moe")))
    parts |= {"mlp": _mlp(config, "intermediate_size"), "moe": mixture}
    blocks: list[BlockSpec] = []
    for i, kind in enumerate(kinds):
        if kind in ("mlp", "moe"):
            if i == 0 or kinds[i - 1] in ("mlp", "moe"):
                rule = f"{kind} at {i} stands behind no mixer, which a spec cannot say"
                config.refuse("layers_block_type", f"{rule}; use a model where one does")
            blocks[-1] = BlockSpec(blocks[-1].mixer, parts[kind])
        else:
            blocks.append(BlockSpec(parts[kind]))
    config.skip("max_position_embeddings", "num_logits_to_keep", "use_mamba_kernels", "chunk_size")
    config.skip("mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "rescale_prenorm_residual")
    config.skip("mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers")
    config.skip("residual_in_fp32", "output_router_logits", "use_bias", "num_query_groups")
    config.only("sliding_window")
    config.only("hidden_dropout", 0.0)
    return llama.trunk(config, blocks, 1e-5, key="layer_norm_epsilon")


def _heads(config: Config) -> AttentionSpec:
    config.only("attention_bias", False)
    config.skip("rope_theta", "partial_rotary_factor", "rope_parameters")  # read by no program
    return AttentionSpec(
        n_heads=config.get("num_attention_heads", int, 32),
        n_kv_heads=config.get("num_key_value_heads", int, 8, null=None),
        head_dim=config.get("head_dim", int, config.get("attention_head_dim", int, 128)),
        position="none",
    )


def _mamba(config: Config) -> Mamba2Spec:
    n_heads, width = config.get("mamba_num_heads", int, 128), config.get("mamba_head_dim", int, 64)
    config.only("mamba_hidden_act", "silu")
    config.skip("expand")  # the heads decide
    steps = {
        ours: config.get(key, float, getattr(Mamba2Spec(), ours)) for ours, key in STEPS.items()
    }
    return Mamba2Spec(
        d_state=config.get("ssm_state_size", int, 128),
        d_conv=config.get("conv_kernel", int, 4),
        expand=n_heads * width / max(1, config.get("hidden_size", int)),
        head_dim=width,
        n_groups=config.get("n_groups", int, 8),
        dt_limit=step_limit(config, "time_step_limit"),
        norm_eps=config.get("layer_norm_epsilon", float, 1e-5),
        conv_bias=config.get("use_conv_bias", bool, True),
        bias=config.get("mamba_proj_bias", bool, False),
        **steps,
    )


def _mlp(config: Config, key: str) -> MLPSpec:
    config.only("mlp_hidden_act", "relu2")
    usual = {"intermediate_size": 21504}.get(key, 7688)
    return MLPSpec(config.get(key, int, usual), "relu2", config.get("mlp_bias", bool, False))


def _mixture(config: Config, shapes: Shapes, n_mixtures: int) -> MoESpec:
    count, most = config.get("n_routed_experts", int, 8), count_values(shapes) // n_mixtures
    if not 1 <= count <= most:
        config.refuse("n_routed_experts", f"{count} cannot be: the tensors allow 1 to {most}")
    count = rows_of_router(config, shapes, "mixer.gate", count)
    config.only("moe_latent_size")
    config.only("n_shared_experts", 1)
    plain = MLPSpec(config.get("moe_intermediate_size", int, 7688), "relu2")
    router = TopK(
        score="sigmoid",
        scale=config.get("routed_scaling_factor", float, 1.0),
        bias_rate=BIAS_RATE,
        n_groups=config.get("n_group", int, 1),
        top_groups=config.get("topk_group", int, 1),
        group_best=2,
    )
    return MoESpec(
        n_experts=count,
        top_k=config.get("num_experts_per_tok", int, 2),
        experts=(plain,) * count,
        router=router,
        normalize="topk" if config.get("norm_topk_prob", bool, True) else "none",
        shared=_mlp(config, "moe_shared_expert_intermediate_size"),
        balance_weight=0.0,
        z_loss_weight=0.0,
    )


def _layers(spec: ModelSpec) -> list[str]:
    kinds: list[str] = []
    for i, block in enumerate(spec.plain_blocks):
        mixers = {"attention": "full_attention", "mamba2": "linear_attention"}
        channels = {"mlp": "mlp", "moe": "moe"}
        for part, table in ((block.mixer, mixers), (block.channel, channels)):
            if part is not None and part.kind not in table:
                raise SpecError(
                    f"blocks[{i}]: {part.kind}, and the format knows {', '.join(table)}"
                )
            kinds += [] if part is None else [table[part.kind]]
    return kinds


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mamba, heads = only_mixer(spec, Mamba2Spec), only_mixer(spec, AttentionSpec)
    channels = [block.channel for block in spec.plain_blocks]
    plain = next((c for c in channels if isinstance(c, MLPSpec)), MLPSpec(1, "relu2"))
    mixture = next((c for c in channels if isinstance(c, MoESpec)), None)
    keys: dict[str, Any] = {"mlp_bias": plain.bias}
    if mixture is not None and isinstance(mixture.router, TopK):
        expert, shared = mixture.expert_specs(spec.d_model)[0], mixture.shared
        if not isinstance(expert, MLPSpec) or not isinstance(shared, MLPSpec):
            raise SpecError("the format knows mixtures of mlp with a shared mlp")
        keys = {
            "mlp_bias": shared.bias,
            "n_routed_experts": mixture.n_experts,
            "num_experts_per_tok": mixture.top_k,
            "moe_intermediate_size": expert.width(spec.d_model),
            "moe_shared_expert_intermediate_size": shared.width(spec.d_model),
            "routed_scaling_factor": mixture.router.scale,
            "n_group": mixture.router.n_groups,
            "topk_group": mixture.router.top_groups,
            "norm_topk_prob": mixture.normalize == "topk",
        }
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": llama.vocabulary(spec).vocab_size,
        "hidden_size": spec.d_model,
        "layers_block_type": _layers(spec),
        "intermediate_size": plain.width(spec.d_model),
        "num_attention_heads": heads.n_heads,
        "num_key_value_heads": heads.kv_heads,
        "head_dim": heads.width(spec.d_model),
        "mlp_hidden_act": "relu2",
        **keys,
        "ssm_state_size": mamba.d_state,
        "conv_kernel": mamba.d_conv,
        "mamba_num_heads": mamba.n_heads(spec.d_model),
        "mamba_head_dim": mamba.head_dim,
        "n_groups": mamba.n_groups,
        "time_step_limit": step_limit_key(mamba),
        "use_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        **{key: getattr(mamba, ours) for ours, key in STEPS.items()},
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tie_head,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    rules, at = renamed(ENDS), 0
    for i, block in enumerate(spec.plain_blocks):
        ours, theirs = f"blocks.{i}.mixer", f"backbone.layers.{at}."
        rules += renamed(
            {
                f"blocks.{i}.mixer_norm.@": f"{theirs}norm.@",
                f"{ours}.@": f"{theirs}mixer.@",
                **{
                    f"{ours}.{part}.@": f"{theirs}mixer.{part}.@"
                    for part in (*PARTS, *(f"{x}_proj" for x in "qkvo"))
                },
            }
        )
        at += 1
        if block.channel is not None:
            rules += _channel(f"blocks.{i}.channel", f"backbone.layers.{at}.", i)
            at += 1
    return [rules]


def _channel(ours: str, theirs: str, i: int) -> list[Rule]:
    return renamed(
        {
            f"blocks.{i}.channel_norm.@": f"{theirs}norm.@",
            f"{ours}.gate.bias": f"{theirs}mixer.gate.e_score_correction_bias",
            f"{ours}.gate.weight": f"{theirs}mixer.gate.weight",
            **{
                f"{ours}.{where}{part}.@": f"{theirs}mixer.{whose}{part}.@"
                for part in ("up_proj", "down_proj")
                for where, whose in (
                    *(("", ""), ("experts.#.", "experts.#.")),
                    ("shared_expert.", "shared_experts."),
                )
            },
        }
    )


NEMOTRON_H = register(
    Family(
        "nemotron_h",
        _spec,
        _layouts,
        _keys,
        tied=("lm_head.weight", "backbone.embeddings.weight"),
        canonical=lambda spec: rated(canonical(spec)),
    )
)
