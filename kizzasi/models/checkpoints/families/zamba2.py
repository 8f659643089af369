"""Zamba2, as transformers stores it: Mamba-2, and blocks of attention beside some of its layers.

A block stands in every num_mem_blocks-th of the hybrid layers, and is stored with the first of
them, with the adapters of all, which are counted over the hybrid layers. Without tied embeddings
transformers ties no block either, and has another in every layer: such files are refused.

The smallest step, time_step_min, holds in both forms here; there, in prompts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.mamba_hf import PARTS, STEPS, d_model_of
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.layers.aside import AsideSpec
from kizzasi.models.layers.layer import LayerSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.ops.activations import Activation
from kizzasi.models.spec import BlockSpec, ModelSpec

KINDS = {"linear_attention": False, "mamba": False, "mamba2": False, "hybrid": True}
GATES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
}
TRUNK = {
    "stem.embedding.@": "model.embed_tokens.@",
    "stem.lm_head.@": "lm_head.@",
    "norm.@": "model.final_layernorm.@",
}
BLOCK = {
    "norm": "input_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "channel_norm": "pre_ff_layernorm",
    "gate_up_proj": "feed_forward.gate_up_proj",
    "down_proj": "feed_forward.down_proj",
}
ADAPTERS = {
    **{name: f"self_attn.linear_{name}_adapter_list" for name in "qkv"},
    "gate_up": "feed_forward.gate_up_proj_adapter_list",
}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers, d_model = llama.depth(config, shapes), d_model_of(config, shapes)
    key = "layers_block_type" if config.data.get("layers_block_type") else "layer_types"
    kinds = config.get(key, tuple[str, ...])
    if len(kinds) != n_layers or not {*kinds} <= KINDS.keys():
        rule = f"{list(kinds)!r:.80} are not {n_layers} of {list(KINDS)}"
        config.refuse(key, rule)
    hybrid = [i for i, kind in enumerate(kinds) if KINDS[kind]]
    config.only("hybrid_layer_ids", hybrid)
    config.skip("layer_types", "layers_block_type")
    mamba = _mamba(config, d_model)
    aside, n_blocks = _aside(config, mamba, d_model), config.get("num_mem_blocks", int, 1)
    if n_blocks < 1:
        config.refuse("num_mem_blocks", f"{n_blocks} is not positive")
    blocks: list[LayerSpec] = [BlockSpec(mamba)] * n_layers
    for place, i in enumerate(hybrid):
        owner = hybrid[place % n_blocks]
        blocks[i] = aside if owner == i else replace(aside, layer=owner)
    config.only("tie_word_embeddings", True)
    config.skip("num_logits_to_keep", "use_mamba_kernels", "use_mem_eff_path", "chunk_size")
    return llama.trunk(config, [BlockSpec(mamba)], 1e-5, tied=True).replace(blocks=tuple(blocks))


def _mamba(config: Config, d_model: int) -> Mamba2Spec:
    inner = int(config.get("mamba_expand", float, 2.0) * d_model)
    n_heads = config.get("n_mamba_heads", int, 8)
    if n_heads < 1 or inner % n_heads:
        config.refuse("n_mamba_heads", f"{n_heads} does not divide {inner} channels")
    config.only("mamba_headdim", inner // n_heads)
    config.only("use_conv_bias", True)
    config.skip("time_step_max", "time_step_floor")  # fresh weights
    return Mamba2Spec(
        d_state=config.get("mamba_d_state", int, 64),
        d_conv=config.get("mamba_d_conv", int, 4),
        expand=inner / d_model,
        head_dim=inner // n_heads,
        n_groups=config.get("mamba_ngroups", int, 1),
        dt_limit=(config.get("time_step_min", float, 1e-3), None),
        norm_eps=1e-5,
        bias=config.get("add_bias_linear", bool, False),
    )


def _aside(config: Config, mamba: Mamba2Spec, d_model: int) -> AsideSpec:
    heads = llama.attention(config)
    n_heads, width = heads.n_heads, 2 * d_model // max(1, heads.n_heads)
    for key in ("num_key_value_heads", "num_query_groups"):
        config.only(key, n_heads)
    config.only("attention_hidden_size", 2 * d_model)
    for key in ("attention_head_dim", "head_dim"):
        config.only(key, width)
    config.only("kv_channels", d_model // max(1, n_heads))
    config.only("use_long_context", False)
    config.skip("max_position_embeddings")
    if heads.rope_scaling is not None:
        config.refuse("rope_parameters", "stretched positions are not supported")
    rotated = config.get("use_mem_rope", bool, False)
    return AsideSpec(
        mixer=mamba,
        n_heads=n_heads,
        hidden=config.get("intermediate_size", int, 4 * d_model),
        head_dim=width,
        position="rope" if rotated else "none",
        rope_theta=heads.rope_theta if rotated else 1e4,
        scale=(width / 2) ** -0.5,
        activation=config.choose("hidden_act", GATES, "gelu"),
        bias=mamba.bias,
        adapter_rank=config.get("adapter_rank", int, 128),
        adapt_heads=config.get("use_shared_attention_adapter", bool, False),
    )


def _canonical(spec: ModelSpec) -> ModelSpec:
    """Widths written out; nothing said of fresh weights."""
    blocks: list[LayerSpec] = []
    for layer in spec.blocks:
        if isinstance(layer, (BlockSpec, AsideSpec)) and isinstance(layer.mixer, Mamba2Spec):
            mixer, usual = layer.mixer, Mamba2Spec()
            steps = {name: getattr(usual, name) for name in STEPS}
            expand = mixer.n_heads(spec.d_model) * mixer.head_dim / spec.d_model
            layer = replace(layer, mixer=replace(mixer, expand=expand, **steps))
        if isinstance(layer, AsideSpec):
            width = layer.width(spec.d_model)
            scale = (width / 2) ** -0.5 if layer.scale is None else layer.scale
            layer = replace(layer, head_dim=width, scale=scale)
        blocks.append(layer)
    return spec.replace(blocks=tuple(blocks))


def _asides(spec: ModelSpec) -> Iterator[tuple[int, int, AsideSpec]]:
    """Every hybrid layer: its index, that of the layer with its block, and its spec."""
    for i, layer in enumerate(spec.blocks):
        if isinstance(layer, AsideSpec):
            yield i, i if layer.layer is None else layer.layer, layer


def _keys(spec: ModelSpec) -> dict[str, Any]:
    asides = list(_asides(spec))
    if not asides:
        raise SpecError("no layer is of the kind 'aside', and the format needs one")
    aside = asides[0][2]
    mamba = aside.mixer
    if not isinstance(mamba, Mamba2Spec):
        raise SpecError(f"blocks[{asides[0][0]}].mixer: {mamba.kind}, and it has mamba2 only")
    gates = {ours: theirs for theirs, ours in reversed(GATES.items())}
    if aside.activation not in gates:
        raise SpecError(f"activation: {aside.activation!r}, and the format knows {[*gates]} only")
    n_heads = mamba.n_heads(spec.d_model)
    return {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        "vocab_size": llama.vocabulary(spec).vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "layers_block_type": [
            "hybrid" if isinstance(layer, AsideSpec) else "mamba" for layer in spec.blocks
        ],
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_expand": n_heads * mamba.head_dim // spec.d_model,
        "mamba_ngroups": mamba.n_groups,
        "n_mamba_heads": n_heads,
        "time_step_min": mamba.dt_limit[0],
        "add_bias_linear": aside.bias,
        "intermediate_size": aside.hidden,
        "hidden_act": gates[aside.activation],
        "num_attention_heads": aside.n_heads,
        "num_key_value_heads": aside.n_heads,
        "num_mem_blocks": sum(layer.layer is None for _, _, layer in asides),
        "use_shared_attention_adapter": aside.adapt_heads,
        "adapter_rank": aside.adapter_rank,
        "use_mem_rope": aside.position == "rope",
        "rope_theta": aside.rope_theta,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_head,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    rules: list[Rule] = []
    for place, (i, owner, _) in enumerate(_asides(spec)):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        shared = f"model.layers.{owner}.shared_transformer."
        block = {f"{ours}block.{name}.@": f"{shared}{other}.@" for name, other in BLOCK.items()}
        adapters = {
            f"{ours}adapters.{name}.{part}.@": f"{shared}{other}.{place}.{k}.@"
            for name, other in ADAPTERS.items()
            for k, part in enumerate(("down", "up"))
        }
        decoder = {
            f"{ours}linear.@": f"{theirs}linear.@",
            f"{ours}norm.@": f"{theirs}mamba_decoder.input_layernorm.@",
            **_mixer(ours, f"{theirs}mamba_decoder.mamba"),
        }
        rules += renamed({**block, **adapters, **decoder})
    plain = {"blocks.#.mixer_norm.@": "model.layers.#.input_layernorm.@"}
    return [[*rules, *renamed({**TRUNK, **plain, **_mixer("blocks.#.", "model.layers.#.mamba")})]]


def _mixer(ours: str, theirs: str) -> dict[str, str]:
    parts = {f"{ours}mixer.{part}.@": f"{theirs}.{part}.@" for part in PARTS}
    return {f"{ours}mixer.@": f"{theirs}.@", **parts}


ZAMBA2 = register(Family("zamba2", _spec, _layouts, _keys, tied=llama.TIED, canonical=_canonical))
