"""Bamba, as transformers stores it: Mamba-2 and attention with half-rotated heads, dense channels.

Half of every head turns. `rope_parameters` may say another part; that is read, and never written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.jamba import TRUNK, attention_keys
from kizzasi.models.checkpoints.families.mamba_hf import (
    d_model_of,
    only_mixer,
    step_limit,
    step_limit_key,
    without_steps,
)
from kizzasi.models.checkpoints.foreign import Family, register
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.spec import BlockSpec, ModelSpec

KINDS = {"full_attention": True, "attention": True, "linear_attention": False, "mamba": False}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    attends = set(config.get("attn_layer_indices", tuple[int, ...], ()))
    if not attends <= set(range(n_layers)):
        config.refuse("attn_layer_indices", f"{sorted(attends)!r:.80} for {n_layers} layers")
    for key in ("layer_types", "layers_block_type"):
        kinds = [i in attends for i in range(n_layers)]
        said = config.get(key, tuple[str, ...], None)
        if said is not None and [KINDS.get(kind) for kind in said] != kinds:
            config.refuse(key, f"{list(said)!r:.80} is not what attn_layer_indices say")
    config.only("partial_rotary_factor", 0.5)
    heads = llama.attention(config, n_kv_heads=8, rotated=0.5)
    bias = config.get("attention_bias", bool, False)
    heads = replace(heads, qkv_bias=bias, out_bias=bias)
    if heads.rope_dims is not None:
        config.only("attn_rotary_emb", heads.rope_dims)
    mamba = mamba_of(config, d_model_of(config, shapes))
    channel = llama.swiglu(config, bias=config.get("mlp_bias", bool, False))
    config.skip("num_logits_to_keep", "z_loss_coefficient")  # of the output; of training
    blocks = [BlockSpec(heads if i in attends else mamba, channel) for i in range(n_layers)]
    return llama.trunk(config, blocks, eps=1e-5)


def mamba_of(config: Config, d_model: int, inner: int | None = None) -> Mamba2Spec:
    """The Mamba-2 layers; `inner` channels where something else than mamba_expand says so."""
    expand = config.get("mamba_expand", float, 2.0)
    inner = int(expand * d_model) if inner is None else inner
    n_heads = config.get("mamba_n_heads", int, 128)
    if n_heads < 1 or inner % n_heads:
        config.refuse("mamba_n_heads", f"{n_heads} does not divide {inner} channels")
    config.only("mamba_d_head", inner // n_heads, "auto")
    config.skip("mamba_chunk_size")  # speed
    return Mamba2Spec(
        d_state=config.get("mamba_d_state", int, 256),
        d_conv=config.get("mamba_d_conv", int, 4),
        expand=inner / d_model,
        head_dim=inner // n_heads,
        n_groups=config.get("mamba_n_groups", int, 1),
        dt_limit=step_limit(config, "time_step_limit"),
        norm_eps=config.get("rms_norm_eps", float, 1e-5),
        conv_bias=config.get("mamba_conv_bias", bool, True),
        bias=config.get("mamba_proj_bias", bool, False),
    )


def mamba_keys(mamba: Mamba2Spec, d_model: int) -> dict[str, Any]:
    """What `mamba_of` reads."""
    n_heads = mamba.n_heads(d_model)
    return {
        "mamba_n_heads": n_heads,
        "mamba_d_head": mamba.head_dim,
        "mamba_n_groups": mamba.n_groups,
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_expand": n_heads * mamba.head_dim // d_model,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "time_step_limit": step_limit_key(mamba),
    }


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mamba, heads = only_mixer(spec, Mamba2Spec), only_mixer(spec, AttentionSpec)
    channel = spec.plain_blocks[0].channel
    attends = [i for i, b in enumerate(spec.plain_blocks) if isinstance(b.mixer, AttentionSpec)]
    return {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        **attention_keys(spec),
        "attention_bias": heads.qkv_bias,
        "mlp_bias": isinstance(channel, SwiGLUSpec) and channel.bias,
        "attn_layer_indices": attends,
        **mamba_keys(mamba, spec.d_model),
    }


BAMBA = register(
    Family(
        "bamba",
        _spec,
        lambda _: [renamed(TRUNK)],
        _keys,
        ignored=llama.ROTARY_BUFFERS,
        tied=llama.TIED,
        canonical=without_steps,
    )
)
