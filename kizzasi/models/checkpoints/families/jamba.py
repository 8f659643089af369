"""Jamba, as transformers stores it: Mamba-1 and attention without positions, dense and mixed.

Which layers attend and which have experts follows from periods and offsets. `num_experts` of 1
means no experts at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from kizzasi.models.channels.moe import PARTS, MoESpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama, mixtures
from kizzasi.models.checkpoints.families.mamba_hf import (
    d_model_of,
    mixer_names,
    only_mixer,
    step_rank,
    without_steps,
)
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.spec import BlockSpec, ModelSpec

LAYER, FEED = llama.LAYER, llama.LAYER + "feed_forward."
TRUNK = {
    **llama.TRUNK,
    "norm.@": "model.final_layernorm.@",
    "blocks.#.channel_norm.@": LAYER + "pre_ff_layernorm.@",
    **mixer_names(LAYER + "mamba"),
    **{f"blocks.#.channel.{part}.@": f"{FEED}{part}.@" for part in PARTS},
}
ROUTER = {mixtures.GATE: FEED + "router.weight"}


def _layouts(spec: ModelSpec) -> list[Rules]:
    return [
        [*renamed(TRUNK | ROUTER), *mixtures.one_by_one(spec, FEED)],
        renamed(TRUNK | ROUTER | mixtures.stacked(FEED)),
    ]


def attention_keys(spec: ModelSpec) -> dict[str, Any]:
    """What `llama.heads` says, of a model in which only some layers attend."""
    only_mixer(spec, AttentionSpec)
    attends = tuple(b for b in spec.plain_blocks if isinstance(b.mixer, AttentionSpec))
    return {
        **llama.heads(spec.replace(blocks=attends)),
        "num_hidden_layers": len(spec.blocks),
        "intermediate_size": llama.width(spec),
    }


def _repeated(config: Config, name: str, period: int, offset: int, n_layers: int) -> list[bool]:
    """Which layers are meant; the numbers are what silence of the config means."""
    period = config.get(f"{name}_layer_period", int, period)
    offset = config.get(f"{name}_layer_offset", int, offset)
    if not 0 <= offset < period:
        config.refuse(f"{name}_layer_offset", f"{offset} is outside a period of {period}")
    return [i % period == offset for i in range(n_layers)]


def period_keys(name: str, layers: Iterable[bool]) -> dict[str, int]:
    """A period and an offset; `write` finds out whether the layers are periodic."""
    places = [i for i, here in enumerate(layers) if here]
    n_layers = len(list(layers))
    first = places[0] if places else n_layers
    period = places[1] - first if len(places) > 1 else n_layers + 1
    return {f"{name}_layer_period": period, f"{name}_layer_offset": first}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    attends = _repeated(config, "attn", 8, 4, n_layers)
    mixed = _repeated(config, "expert", 2, 1, n_layers)
    heads = AttentionSpec(
        n_heads=config.get("num_attention_heads", int),
        n_kv_heads=config.get("num_key_value_heads", int, 8, null=None),
        head_dim=config.get("head_dim", int, None),
        position="none",
    )
    mamba = _mamba(config, d_model_of(config, shapes))
    dense = llama.swiglu(config)
    sparse = _mixture(config, shapes, sum(mixed))
    config.skip("use_mamba_kernels", "use_mambapy", "use_associative_scan")  # speed
    config.skip("num_logits_to_keep", "calc_logits_for_entire_prompt")  # of the output only
    config.skip("max_position_embeddings", "n_ctx")  # no positions
    config.only("sliding_window")
    blocks = [
        BlockSpec(heads if attend else mamba, sparse if sparse and mix else dense)
        for attend, mix in zip(attends, mixed, strict=True)
    ]
    return llama.trunk(config, blocks)


def _mamba(config: Config, d_model: int) -> MambaSpec:
    config.only("mamba_inner_layernorms", True)
    return MambaSpec(
        d_state=config.get("mamba_d_state", int, 16),
        d_conv=config.get("mamba_d_conv", int, 4),
        expand=int(config.get("mamba_expand", float, 2.0) * d_model) / d_model,
        dt_rank=step_rank(config, "mamba_dt_rank"),
        conv_bias=config.get("mamba_conv_bias", bool, True),
        bias=config.get("mamba_proj_bias", bool, False),
        inner_norm="rms",
        inner_norm_eps=config.get("rms_norm_eps", float, 1e-6),
    )


def _mixture(config: Config, shapes: Shapes, n_mixtures: int) -> MoESpec | None:
    if n_mixtures and config.get("num_experts", int, 16) > 1:
        hidden = config.get("intermediate_size", int)
        mixture = mixtures.read_mixture(
            config, shapes, n_mixtures, hidden=hidden, experts=16, top_k=2
        )
        return replace(mixture, normalize="all")
    config.skip("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
    config.skip("output_router_logits")
    return None


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mamba = only_mixer(spec, MambaSpec)
    sparse = [isinstance(block.channel, MoESpec) for block in spec.plain_blocks]
    keys = {**attention_keys(spec), "num_experts": 1}
    if any(sparse):
        keys |= mixtures.mixture_keys(spec)
        keys["num_experts"] = mixtures.mixtures_of(spec)[0].n_experts
        keys["intermediate_size"] = mixtures.expert_width(spec)
    for rotary in ("rope_theta", "rope_scaling"):
        del keys[rotary]
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        **keys,
        **period_keys("attn", [isinstance(b.mixer, AttentionSpec) for b in spec.plain_blocks]),
        **period_keys("expert", sparse),
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_expand": round(mamba.expand),
        "mamba_dt_rank": mamba.rank(spec.d_model),
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
    }


JAMBA = register(
    Family(
        "jamba",
        _spec,
        _layouts,
        _keys,
        tied=llama.TIED,
        canonical=without_steps,
    )
)
