"""RWKV in folders with a config.json: transformers' `rwkv` (version 4), and `rwkv7` of fla-hub.

| model_type | mixer | what differs from RWKV-LM's names |
|---|---|---|
| rwkv | rwkv4 | longer names; `rescale_every` halves weights in memory only, so it is ignored |
| rwkv7 | rwkv7 | w1 w2 a1 ... g2 are transposed into Linear layers, whose biases are w0, a0, v0 |

An old `rwkv7` stores x_r ... x_g as one x_x.
"""

from __future__ import annotations

import math
from typing import Any

from kizzasi.errors import CheckpointError
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.rwkv_pth import (
    FLAT,
    SHIFTS,
    canonical,
    same_blocks,
    sizes_of,
)
from kizzasi.models.checkpoints.foreign import Family, register
from kizzasi.models.checkpoints.names import STACKED, TRANSPOSED, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.rwkv4 import RWKV4Spec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

GROUP_NORM_EPS = 64e-5  # our mixer's, whatever head_dim
MIXES = {"k": "key", "v": "value", "r": "receptance"}
RWKV4_RULES = [
    *(
        Rule(
            f"blocks.#.{ours}.time_mix_{short}",
            f"rwkv.blocks.#.{theirs}.time_mix_{long}",
            FLAT,
        )
        for ours, theirs in (("mixer", "attention"), ("channel", "feed_forward"))
        for short, long in MIXES.items()
    ),
    *renamed(
        {
            "stem.embedding.@": "rwkv.embeddings.@",
            "stem.lm_head.@": "head.@",
            "embed_norm.@": "rwkv.blocks.0.pre_ln.@",
            "norm.@": "rwkv.ln_out.@",
            "blocks.#.mixer_norm.@": "rwkv.blocks.#.ln1.@",
            "blocks.#.channel_norm.@": "rwkv.blocks.#.ln2.@",
            "blocks.#.mixer.@": "rwkv.blocks.#.attention.@",
            **{
                f"blocks.#.{ours}.{part}.@": f"rwkv.blocks.#.{theirs}.{part}.@"
                for ours, theirs in (("mixer", "attention"), ("channel", "feed_forward"))
                for part in ("key", "value", "receptance", "output")
            },
        }
    ),
]
FLA, MIXER = "model.layers.#.", "blocks.#.mixer."
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
RANKS = (
    ("decay_rank", "decay_low_rank_dim", "w"),
    ("a_rank", "a_low_rank_dim", "a"),
    ("gate_rank", "gate_low_rank_dim", "g"),
    ("v_rank", "v_low_rank_dim", "v"),
)
RWKV7_RULES = [
    *(
        Rule(f"{MIXER}{name}{i}", f"{FLA}attn.{name}_lora.lora.{j}.weight", TRANSPOSED)
        for name in "wavg"
        for i, j in ((1, 0), (2, 2))
    ),
    *renamed(
        {
            "stem.embedding.@": "model.embeddings.@",
            "stem.lm_head.@": "lm_head.@",
            "embed_norm.@": "model.layers.0.pre_norm.@",
            "norm.@": "model.norm.@",
            "blocks.#.mixer_norm.@": FLA + "attn_norm.@",
            "blocks.#.channel_norm.@": FLA + "ffn_norm.@",
            **{f"{MIXER}{name}0": f"{FLA}attn.{name}_lora.lora.2.bias" for name in "wav"},
            **{f"{MIXER}{name}": f"{FLA}attn.{name}" for name in ("k_k", "k_a", "r_k")},
            **{f"{MIXER}{ours}.@": f"{FLA}attn.{name}.@" for ours, name in PROJECTIONS.items()},
            MIXER + "ln_x.@": FLA + "attn.g_norm.@",
            "blocks.#.channel.x_k": FLA + "ffn.x_k",
            "blocks.#.channel.key.@": FLA + "ffn.key.@",
            "blocks.#.channel.value.@": FLA + "ffn.value.@",
        }
    ),
]


def _model(
    config: Config, blocks: tuple[BlockSpec, ...], *, eps: float, embed_norm: bool
) -> ModelSpec:
    return ModelSpec(
        d_model=config.get("hidden_size", int),
        blocks=blocks,
        stem=Tokens(config.get("vocab_size", int)),
        norm="layer",
        norm_eps=eps,
        embed_norm=embed_norm,
        tie_head=config.get("tie_word_embeddings", bool, False),
    )


def _keys(
    spec: ModelSpec, kind: str, architecture: str, channel: RWKVChannelSpec
) -> dict[str, Any]:
    """What both formats say alike."""
    if not isinstance(spec.stem, Tokens):
        raise CheckpointError(f"stem is {spec.stem.kind}, and the format knows tokens only")
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": spec.stem.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": channel.hidden,
        "num_hidden_layers": len(spec.blocks),
        "tie_word_embeddings": spec.tie_head,
    }


def _rwkv4(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = config.count("num_hidden_layers", len(shapes))
    config.skip("context_length", "max_position_embeddings", "rescale_every")
    mixer = RWKV4Spec(config.get("attention_hidden_size", int, None))
    channel = RWKVChannelSpec(config.get("intermediate_size", int, None), version=4)
    eps = config.get("layer_norm_epsilon", float, 1e-5)
    blocks = (BlockSpec(mixer, channel, norm="layer"),) * n_layers
    return _model(config, blocks, eps=eps, embed_norm=True)


def _rwkv4_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = same_blocks(spec, RWKV4Spec, 4)
    return {
        **_keys(spec, "rwkv", "RwkvForCausalLM", channel),
        "attention_hidden_size": mixer.d_inner,
        "layer_norm_epsilon": spec.norm_eps,
        "rescale_every": 0,
    }


def _rwkv7(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = config.count("num_hidden_layers", len(shapes))
    config.skip("attn_mode", "max_position_embeddings", "fuse_norm", "fuse_cross_entropy")
    config.skip("fuse_linear_cross_entropy", "use_l2warp", "hidden_ratio", "num_heads")
    config.only("attn")
    config.only("hidden_act", "sqrelu")
    config.only("norm_bias", True)
    config.only("value_dim", [config.get("hidden_size", int)] * n_layers)
    sizes, eps = sizes_of(config, shapes), config.get("norm_eps", float, 1e-5)
    head_dim = sizes("model.layers.0.attn.r_k", 2)[1]
    if not math.isclose(head_dim * eps, GROUP_NORM_EPS, rel_tol=1e-6):
        rule = f"times the {head_dim} channels of a head it is not {GROUP_NORM_EPS}"
        config.refuse("norm_eps", f"{eps} is not supported: {rule}")
    ranks: dict[str, int] = {}
    for field, key, name in RANKS if n_layers > 1 else RANKS[:-1]:
        stored = f"model.layers.{n_layers - 1}.attn.{name}_lora.lora.0.weight"
        ranks[field] = sizes(stored, 2)[0]
        config.only(key, ranks[field])
    config.skip("v_low_rank_dim")  # the first layer alone has none
    mixer = RWKV7Spec(config.get("head_dim", int, head_dim), **ranks)
    channel = RWKVChannelSpec(sizes("model.layers.0.ffn.key.weight", 2)[0])
    config.only("intermediate_size", channel.hidden)
    blocks = (BlockSpec(mixer, channel, norm="layer"),) * n_layers
    return _model(config, blocks, eps=eps, embed_norm=config.get("norm_first", bool, True))


def _rwkv7_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = same_blocks(spec, RWKV7Spec, 7)
    return {
        **_keys(spec, "rwkv7", "RWKV7ForCausalLM", channel),
        "head_dim": mixer.head_dim,
        "hidden_act": "sqrelu",
        "norm_bias": True,
        "norm_eps": spec.norm_eps,
        "norm_first": spec.embed_norm,
        **{key: getattr(mixer, field) for field, key, _ in RANKS},
    }


register(
    Family(
        "rwkv",
        _rwkv4,
        lambda _: [RWKV4_RULES],
        _rwkv4_config,
        tied=("head.weight", "rwkv.embeddings.weight"),
        canonical=canonical,
    )
)
register(
    Family(
        "rwkv7",
        _rwkv7,
        lambda _: [
            [*(Rule(MIXER + name, f"{FLA}attn.{name}", FLAT) for name in SHIFTS), *RWKV7_RULES],
            [Rule([MIXER + name for name in SHIFTS], FLA + "attn.x_x", STACKED), *RWKV7_RULES],
        ],
        _rwkv7_config,
        tied=("lm_head.weight", "model.embeddings.weight"),
        canonical=canonical,
    )
)
