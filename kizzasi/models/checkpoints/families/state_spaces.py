"""The original Mamba checkpoints of state-spaces/mamba: config.json without "model_type", and
pytorch_model.bin, in which a tied head is stored too.

`ssm_cfg`, `attn_cfg` and `d_intermediate` are the arguments of their Mamba1, Mamba2 or Mamba3, MHA
and GatedMLP. Attention with a convolution over its projections (mamba2attn-2.7b) is refused, and so
are Mamba3 with several inputs per head or a norm of its output.

Which activation a Mamba3's decays were trained with is not in the file: their program has used one,
heavy_tail, since June 2026, and softplus before. Without a key it is read as the newer; for older
weights put `"a_activation": "softplus"` into `ssm_cfg`, where their program ignores it.

Source: mixer_seq_simple.py, mha.py and mlp.py of state-spaces/mamba.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.llama import vocabulary
from kizzasi.models.checkpoints.families.mamba_hf import (
    NAMES,
    canonical,
    d_model_of,
    only_mixer,
    step_limit,
    step_limit_key,
    step_rank,
)
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import CONCATENATED, Form, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.mixers.mamba3 import Mamba3Spec
from kizzasi.models.norm import NormKind
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

LAYER = "backbone.layers.#."
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
HIDDEN_MULTIPLE = 128  # of GatedMLP
DECAYS = ("heavy_tail", "softplus")
STEPS = {"dt_min": "dt_min", "dt_max": "dt_max", "dt_floor": "dt_init_floor"}


TWICE = Form(lambda ours: [*ours, *ours], lambda theirs, shapes: theirs[:1])
RULES = [
    *(
        Rule(
            [f"blocks.#.mixer.{q}_proj.{leaf}" for q in "qkv"],
            f"{LAYER}mixer.in_proj.{leaf}",
            CONCATENATED,
        )
        for leaf in ("weight", "bias")
    ),
    Rule(
        [f"blocks.#.channel.{part}_proj.weight" for part in ("up", "gate")],
        f"{LAYER}mlp.fc1.weight",
        CONCATENATED,
    ),
    *renamed(
        {
            **NAMES,
            **{f"blocks.#.mixer.{bc}_norm.@": f"{LAYER}mixer.{bc}_norm.@" for bc in "BC"},
            "stem.embedding.@": "backbone.embedding.@",
            "blocks.#.mixer.o_proj.@": f"{LAYER}mixer.out_proj.@",
            "blocks.#.channel_norm.@": f"{LAYER}norm2.@",
            "blocks.#.channel.down_proj.@": f"{LAYER}mlp.fc2.@",
        }
    ),
]


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    """Their own files store a tied head; files without one are read too."""
    twin = Rule("stem.embedding.weight", (EMBEDDING, HEAD), TWICE)
    return [[twin, *RULES], RULES] if spec.tie_head else [RULES]


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    d_model, n_layers = d_model_of(config, shapes, "d_model"), config.count("n_layer", len(shapes))
    norm: NormKind = "rms" if config.get("rms_norm", bool, True) else "layer"
    config.skip("residual_in_fp32", "fused_add_norm")  # precision and speed
    channel = _channel(config)
    attends = set(config.get("attn_layer_idx", tuple[int, ...], ()))
    if not attends <= set(range(n_layers)):
        config.refuse("attn_layer_idx", f"{sorted(attends)!r:.80} for {n_layers} layers")
    mamba = BlockSpec(_mamba(config, d_model), channel, norm)
    attention = replace(mamba, mixer=_attention(config)) if attends else mamba
    config.skip("attn_cfg")  # where no layer attends
    multiple = config.get("pad_vocab_size_multiple", int, 8)
    vocab_size = config.get("vocab_size", int)
    return ModelSpec(
        d_model=d_model,
        blocks=tuple(attention if i in attends else mamba for i in range(n_layers)),
        stem=Tokens(vocab_size + -vocab_size % max(1, multiple)),
        norm=norm,
        tie_head=config.get("tie_embeddings", bool, True),
    )


def _channel(config: Config) -> SwiGLUSpec | None:
    hidden = config.get("d_intermediate", int, 0)
    return SwiGLUSpec(hidden + -hidden % HIDDEN_MULTIPLE) if hidden else None


def _mamba(config: Config, d_model: int) -> MambaSpec | Mamba2Spec | Mamba3Spec:
    keys = config.within("ssm_cfg") or Config({}, config.where)
    makers = {"Mamba1": _mamba1, "Mamba2": _mamba2, "Mamba3": _mamba3}
    make = keys.choose("layer", makers, "Mamba1")
    steps = {ours: keys.get(key, float, getattr(MambaSpec(), ours)) for ours, key in STEPS.items()}
    mixer = replace(make(keys, d_model), **steps)
    if isinstance(mixer, Mamba3Spec):
        keys.finish(())
        return mixer
    mixer = replace(
        mixer,
        d_conv=keys.get("d_conv", int, 4),
        conv_bias=keys.get("conv_bias", bool, True),
        bias=keys.get("bias", bool, False),
    )
    keys.finish(())
    return mixer


def _mamba1(keys: Config, d_model: int) -> MambaSpec:
    keys.skip("dt_init", "dt_scale", "use_fast_path")  # fresh weights; speed
    return MambaSpec(
        d_state=keys.get("d_state", int, 16),
        expand=int(keys.get("expand", float, 2.0) * d_model) / d_model,
        dt_rank=step_rank(keys, "dt_rank"),
    )


def _mamba2(keys: Config, d_model: int) -> Mamba2Spec:
    keys.skip("conv_init", "A_init_range")  # fresh weights
    keys.skip("chunk_size", "use_mem_eff_path", "sequence_parallel")  # speed
    expand = keys.get("expand", int, 2)
    keys.only("d_ssm", expand * d_model)
    keys.only("D_has_hdim", False)
    return Mamba2Spec(
        d_state=keys.get("d_state", int, 128),
        expand=float(expand),
        head_dim=keys.get("headdim", int, 64),
        n_groups=keys.get("ngroups", int, 1),
        dt_limit=step_limit(keys, "dt_limit"),
        rms_norm=keys.get("rmsnorm", bool, True),
        norm_before_gate=keys.get("norm_before_gate", bool, False),
    )


def _mamba3(keys: Config, d_model: int) -> Mamba3Spec:
    keys.skip("chunk_size", "dropout")  # speed; their program ignores it
    keys.skip("mimo_rank")  # of what follows
    keys.only("is_mimo", False)
    keys.only("is_outproj_norm", False)
    return Mamba3Spec(
        d_state=keys.get("d_state", int, 128),
        expand=int(keys.get("expand", float, 2.0) * d_model) / d_model,
        head_dim=keys.get("headdim", int, 64),
        n_groups=keys.get("ngroups", int, 1),
        rope_fraction=keys.get("rope_fraction", float, 0.5),
        a_activation=keys.choose("a_activation", {name: name for name in DECAYS}, "heavy_tail"),
        A_floor=keys.get("A_floor", float, 1e-4),
    )


def _attention(config: Config) -> AttentionSpec:
    keys = config.within("attn_cfg") or Config({}, config.where, "attn_cfg.")
    if not keys.get("causal", bool, False):
        keys.refuse("causal", "false, and these models predict the next token; set it to true")
    if keys.get("d_conv", int, 0):
        keys.refuse("d_conv", "a convolution over queries, keys and values is not supported")
    keys.only("mlp_dim", 0)
    keys.only("softmax_scale")
    keys.only("rotary_emb_interleaved", False)
    rotated = keys.get("rotary_emb_dim", int, 0)
    theta = keys.get("rotary_emb_base", float, 1e4)
    bias = keys.get("qkv_proj_bias", bool, True)
    mixer = AttentionSpec(
        n_heads=keys.get("num_heads", int),
        n_kv_heads=keys.get("num_heads_kv", int, None),
        head_dim=keys.get("head_dim", int, None),
        position="rope" if rotated else "none",
        rope_theta=theta,
        rope_dims=rotated or None,
        qkv_bias=bias,
        out_bias=keys.get("out_proj_bias", bool, True),
    )
    keys.finish(())
    return mixer


def _keys(spec: ModelSpec) -> dict[str, Any]:
    attends = [i for i, b in enumerate(spec.plain_blocks) if isinstance(b.mixer, AttentionSpec)]
    channel = spec.plain_blocks[0].channel
    return {
        "d_model": spec.d_model,
        "d_intermediate": channel.width(spec.d_model) if isinstance(channel, SwiGLUSpec) else 0,
        "n_layer": len(spec.blocks),
        "vocab_size": vocabulary(spec).vocab_size,
        "ssm_cfg": _mamba_keys(spec) if len(attends) < len(spec.blocks) else {},
        "attn_layer_idx": attends,
        "attn_cfg": _attention_keys(spec) if attends else {},
        "rms_norm": spec.norm == "rms",
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": spec.tie_head,
    }


def _mamba_keys(spec: ModelSpec) -> dict[str, Any]:
    kinds = {type(block.mixer) for block in spec.plain_blocks}
    mixer = only_mixer(spec, next((k for k in (Mamba2Spec, Mamba3Spec) if k in kinds), MambaSpec))
    keys = {key: getattr(mixer, ours) for ours, key in STEPS.items()}
    if isinstance(mixer, Mamba3Spec):
        same = ("d_state", "expand", "rope_fraction", "a_activation", "A_floor")
        keys |= {key: getattr(mixer, key) for key in same}
        return {"layer": "Mamba3", **keys, "headdim": mixer.head_dim, "ngroups": mixer.n_groups}
    keys |= {key: getattr(mixer, key) for key in ("d_state", "d_conv", "conv_bias", "bias")}
    keys["expand"] = int(mixer.expand) if mixer.expand == int(mixer.expand) else mixer.expand
    if isinstance(mixer, MambaSpec):
        return {"layer": "Mamba1", **keys, "dt_rank": mixer.rank(spec.d_model)}
    return {
        "layer": "Mamba2",
        **keys,
        "headdim": mixer.head_dim,
        "ngroups": mixer.n_groups,
        "dt_limit": step_limit_key(mixer),
        "rmsnorm": mixer.rms_norm,
        "norm_before_gate": mixer.norm_before_gate,
    }


def _attention_keys(spec: ModelSpec) -> dict[str, Any]:
    mixer = only_mixer(spec, AttentionSpec)
    width = mixer.width(spec.d_model)
    return {
        "causal": mixer.causal,
        "num_heads": mixer.n_heads,
        "num_heads_kv": mixer.kv_heads,
        "head_dim": width,
        "qkv_proj_bias": mixer.qkv_bias,
        "out_proj_bias": mixer.out_bias,
        "rotary_emb_dim": (mixer.rope_dims or width) if mixer.position == "rope" else 0,
        "rotary_emb_base": mixer.rope_theta,
    }


STATE_SPACES = register(
    Family(
        "state_spaces",
        _spec,
        _layouts,
        _keys,
        signature=(EMBEDDING, "backbone.norm_f.weight"),
        tied=(HEAD, EMBEDDING),
        canonical=canonical,
        file="pytorch_model.bin",
    )
)
