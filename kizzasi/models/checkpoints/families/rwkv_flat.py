"""RWKV-7 in the files of RWKV-LM's research on version 8: names numbered from 1, and biases.

Beside the two mixes of a block a research branch (rosa) may stand, switched off: all that it adds
is its bias, which is the mixer's here. Its other tensors and its norm (ln#c) are not read, and not
written again; nor are v0, v1, v2 of the first layer, which no program uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.rwkv_pth import (
    FLAT,
    NORM_EPS,
    VERSIONS,
    canonical,
    depth,
    same_blocks,
    sizes_of,
)
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

ROSA = ("x_q", "x_k", "x_v", "rosa_qkv.emb", "o.weight")
ROSA += tuple(f"{part}.{leaf}" for part in "qkv" for leaf in ("weight", "bias"))
IGNORED = (
    *(f"rosa#.{name}" for name in ROSA),
    *(f"ln#c.{leaf}" for leaf in ("weight", "bias")),
    *(f"rwkv1.v{i}" for i in range(3)),
)


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    sizes, n_layers = sizes_of(config, shapes), depth({**shapes, "ln0a.weight": ()}, "ln#a.weight")
    vocab_size, d_model = sizes("e.weight", 2)
    mixer = RWKV7Spec(
        head_dim=sizes("rwkv1.r_k", 2)[1],
        decay_rank=sizes("rwkv1.w1", 2)[1],
        a_rank=sizes("rwkv1.a1", 2)[1],
        v_rank=sizes("rwkv2.v1", 2)[1] if n_layers > 2 else None,
        gate_rank=sizes("rwkv1.g1", 2)[1],
        bias="rosa1.o.bias" in shapes,
    )
    channel = RWKVChannelSpec(sizes("ffn1.key.weight", 2)[0])
    return ModelSpec(
        d_model=d_model,
        blocks=(BlockSpec(mixer, channel, norm="layer"),) * (n_layers - 1),
        stem=Tokens(vocab_size, head_bias="o.bias" in shapes),
        norm="layer",
        norm_eps=NORM_EPS,
    )


def _rules(n_layers: int) -> Iterator[Rule]:
    for i in range(n_layers):
        ours, theirs = f"blocks.{i}.", f"rwkv{i + 1}."
        for name in VERSIONS["blocks.0.att.r_k"].flat:
            yield Rule(f"{ours}mixer.{name}", theirs + name, FLAT)
        yield Rule(f"{ours}channel.x_k", f"ffn{i + 1}.x_k", FLAT)
        table = {
            f"{ours}mixer_norm.@": f"ln{i + 1}a.@",
            f"{ours}channel_norm.@": f"ln{i + 1}b.@",
            f"{ours}mixer.output.bias": f"rosa{i + 1}.o.bias",
            f"{ours}mixer.@": f"{theirs}@",
            **{f"{ours}channel.{part}.@": f"ffn{i + 1}.{part}.@" for part in ("key", "value")},
            **{
                f"{ours}mixer.{part}.@": f"{theirs}{part}.@"
                for part in ("receptance", "key", "value", "output", "ln_x")
            },
        }
        yield from renamed(table)


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    same_blocks(spec, RWKV7Spec, 7)
    ends = {"stem.embedding.@": "e.@", "stem.lm_head.@": "o.@", "norm.@": "lno.@"}
    return [[*renamed(ends), *_rules(len(spec.blocks))]]


register(
    Family(
        name="rwkv_flat",
        spec=_spec,
        layouts=_layouts,
        config=None,
        signature=("e.weight", "ln1a.weight", "rwkv1.r_k", "lno.weight"),
        ignored=IGNORED,
        canonical=canonical,
        file="model.pth",
    )
)
