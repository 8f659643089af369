"""RWKV-6 and RWKV-7 in GGUF.

Low-rank maps are stored transposed, the shares of the token before in one tensor, and numbers per
head flat. llama.cpp wants v0, v1, v2 of RWKV-7's first layer, which no program uses: they are
written as copies of a0, a1, a2 and never read. RWKV-6 is read only; where it was stored with halved
weights (`rescale_every_n_layers`), they are doubled back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kizzasi.models.channels.rwkv_channel import ChannelVersion, RWKVChannelSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.llama import vocabulary as tokens_of
from kizzasi.models.checkpoints.families.rwkv_pth import SHIFTS, canonical, same_blocks, sizes_of
from kizzasi.models.checkpoints.foreign import Family, Rules
from kizzasi.models.checkpoints.gguf.words import EMBEDDING, HEAD, TIED, vocabulary
from kizzasi.models.checkpoints.names import TRANSPOSED, Form, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixer import MixerSpec
from kizzasi.models.mixers.rwkv6 import RWKV6Spec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

EPS = "attention.layer_norm_epsilon"
RESCALE = "rescale_every_n_layers"
RANKS = {"decay": "w", "iclr": "a", "value_residual_mix": "v", "gate": "g"}
OURS, THEIRS, CHANNEL = "blocks.#.mixer.", "blk.#.time_mix_", "blk.#.channel_mix_"
NAMES = {
    "stem.embedding.@": "token_embd.@",
    "stem.lm_head.@": "output.@",
    "embed_norm.@": "token_embd_norm.@",
    "norm.@": "output_norm.@",
    "blocks.#.mixer_norm.@": "blk.#.attn_norm.@",
    "blocks.#.channel_norm.@": "blk.#.attn_norm_2.@",
    OURS + "ln_x.@": THEIRS + "ln.@",
    **{
        f"{OURS}{part}.@": f"{THEIRS}{part}.@"
        for part in ("receptance", "key", "value", "gate", "output")
    },
    **{
        f"blocks.#.channel.{part}.@": f"{CHANNEL}{part}.@"
        for part in ("receptance", "key", "value")
    },
}


def _fused(*shape: int) -> Form:
    """Vectors of ours in one tensor, of this shape but for its last dimension."""
    return Form(
        lambda ours: [torch.stack(ours).reshape(*shape, -1)],
        lambda theirs, shapes: list(theirs[0].reshape(len(shapes), -1).unbind()),
    )


FLAT = Form(
    lambda ours: [t.flatten() for t in ours],
    lambda theirs, shapes: [t.reshape(s) for t, s in zip(theirs, shapes, strict=True)],
)
RULES_6 = [
    Rule([f"{OURS}time_maa_{x}" for x in "wkvrg"], THEIRS + "lerp_fused.weight", _fused(5, 1, 1)),
    *(
        Rule(f"{OURS}{ours}", f"{THEIRS}{theirs}.weight", TRANSPOSED)
        for ours, theirs in (
            *(("time_maa_w1", "w1"), ("time_maa_w2", "w2")),
            *(("time_decay_w1", "decay_w1"), ("time_decay_w2", "decay_w2")),
        )
    ),
    *renamed(
        {
            **NAMES,
            OURS + "time_maa_x": THEIRS + "lerp_x.weight",
            OURS + "time_decay": THEIRS + "decay.weight",
            OURS + "time_faaaa": THEIRS + "first.weight",
            **{f"blocks.#.channel.time_maa_{x}": f"{CHANNEL}lerp_{x}.weight" for x in "kr"},
        }
    ),
]
RULES_7 = [
    Rule([f"{OURS}{x}" for x in SHIFTS], THEIRS + "lerp_fused.weight", _fused(6, 1, 1)),
    *(Rule(f"{OURS}{x}{i}", f"{THEIRS}{x}{i}.weight", TRANSPOSED) for x in "wavg" for i in (1, 2)),
    Rule(OURS + "r_k", THEIRS + "r_k.weight", FLAT),
    *renamed(
        {
            **NAMES,
            **{f"{OURS}{x}": f"{THEIRS}{x}.weight" for x in ("w0", "a0", "v0", "k_k", "k_a")},
            "blocks.#.channel.x_k": CHANNEL + "lerp_k.weight",
        }
    ),
]
UNUSED = {f"blk.0.time_mix_v{i}.weight": f"blk.0.time_mix_a{i}.weight" for i in range(3)}


def _model(config: Config, shapes: Shapes, mixer: MixerSpec, version: ChannelVersion) -> ModelSpec:
    n_layers = config.count("block_count", len(shapes))
    hidden = sizes_of(config, shapes)("blk.0.channel_mix_key.weight", 2)[0]
    config.only("feed_forward_length", hidden)
    config.only("attention.head_count", 0)
    config.only("token_shift_count", 2)
    config.skip("context_length")  # no positions
    return ModelSpec(
        d_model=config.get("embedding_length", int),
        blocks=(BlockSpec(mixer, RWKVChannelSpec(hidden, version), norm="layer"),) * n_layers,
        stem=Tokens(vocabulary(config, shapes)),
        norm="layer",
        norm_eps=config.get(EPS, float, 1e-5),
        embed_norm="token_embd_norm.weight" in shapes,
        tie_head=HEAD not in shapes and EMBEDDING in shapes,
    )


def _rwkv6(config: Config, shapes: Shapes) -> ModelSpec:
    sizes = sizes_of(config, shapes)
    mixer = RWKV6Spec(
        head_dim=config.get("wkv.head_size", int),
        mix_rank=sizes("blk.0.time_mix_w2.weight", 3)[2],
        decay_rank=sizes("blk.0.time_mix_decay_w1.weight", 2)[0],
    )
    config.skip("time_mix_extra_dim", "time_decay_extra_dim")  # the tensors tell
    config.skip(RESCALE)  # undone in `doubled`
    return _model(config, shapes, mixer, 6)


def _rwkv7(config: Config, shapes: Shapes) -> ModelSpec:
    sizes, ranks = sizes_of(config, shapes), dict[str, int]()
    several = "blk.1.attn_norm.weight" in shapes
    for name, part in RANKS.items():
        layer = 1 if part == "v" and several else 0
        ranks[part] = sizes(f"blk.{layer}.time_mix_{part}1.weight", 2)[0]
        if layer or part != "v":
            config.only(f"attention.{name}_lora_rank", ranks[part])
    config.skip("attention.value_residual_mix_lora_rank")  # a lone layer has no use for it
    mixer = RWKV7Spec(
        head_dim=config.get("wkv.head_size", int),
        decay_rank=ranks["w"],
        a_rank=ranks["a"],
        v_rank=ranks["v"] if several else None,
        gate_rank=ranks["g"],
    )
    return _model(config, shapes, mixer, 7)


def _metadata(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = same_blocks(spec, RWKV7Spec, 7)
    ranks = mixer.ranks(spec.d_model)
    return {
        "embedding_length": spec.d_model,
        "block_count": len(spec.blocks),
        "feed_forward_length": channel.width(spec.d_model),
        "attention.head_count": 0,
        EPS: spec.norm_eps,
        "wkv.head_size": mixer.head_dim,
        "vocab_size": tokens_of(spec).vocab_size,
        **{f"attention.{name}_lora_rank": ranks[part] for name, part in RANKS.items()},
    }


def _rules(rules: Rules) -> Any:
    def layouts(_: ModelSpec) -> Sequence[Rules]:
        return [rules]

    return layouts


def doubled(name: str, metadata: Mapping[str, Any]) -> float:
    """What a tensor of RWKV-6 was divided by when the file was made."""
    every = metadata.get(f"rwkv6.{RESCALE}", 0)
    match = re.fullmatch(r"blk\.(\d{1,6})\.(?:time_mix_output|channel_mix_value)\.weight", name)
    if match is None or not isinstance(every, int) or every < 1:
        return 1.0
    return 2.0 ** min(int(match[1]) // every, 1000)


def padded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With what llama.cpp asks of the first layer of RWKV-7."""
    more = {name: tensors[twin].clone() for name, twin in UNUSED.items() if twin in tensors}
    return {**tensors, **more}


RWKV = {
    "rwkv6": Family("rwkv6", _rwkv6, _rules(RULES_6), None, tied=TIED, canonical=canonical),
    "rwkv7": Family(
        "rwkv7",
        _rwkv7,
        _rules(RULES_7),
        _metadata,
        ignored=tuple(UNUSED),
        tied=TIED,
        canonical=canonical,
    ),
}
