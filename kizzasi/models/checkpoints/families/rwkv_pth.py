"""RWKV-LM's own files: a dict of tensors and nothing else. One tensor's name tells the version.

| version | told by | mixer | channel |
|---|---|---|---|
| 4 | att.time_first | rwkv4 | rwkv_channel, version 4 |
| 5.2 | att.time_mix_g | rwkv5 | rwkv_channel, version 4 |
| 6 | att.time_maa_w1 | rwkv6 | rwkv_channel, version 6 |
| 7 | att.r_k | rwkv7 | rwkv_channel, version 7 |

Some vectors are stored as (1, 1, d). The v0, v1, v2 of version 7's first layer are used by no
program: they are not read, and not written again. Nor is an initial memory (`time_state`), of which
reading warns: see rwkv_state.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from kizzasi.errors import CheckpointError
from kizzasi.models.channels.rwkv_channel import SHARES, ChannelVersion, RWKVChannelSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import Rule, renamed, reshaped
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixer import MixerSpec
from kizzasi.models.mixers.rwkv4 import RWKV4Spec
from kizzasi.models.mixers.rwkv5 import RWKV5Spec
from kizzasi.models.mixers.rwkv6 import RWKV6Spec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

NORM_EPS = 1e-5
FLAT = reshaped(1, 1, -1)
M = TypeVar("M", bound=MixerSpec)
Sizes = Callable[[str, int], Sequence[int]]  # the shape of a tensor of so many dimensions


class Version(NamedTuple):
    """One version of RWKV.

    mixer    its spec.
    read     how that follows from the shapes and the number of layers.
    channel  version of the channel.
    flat     parameters of the mixer that are stored as (1, 1, d).
    """

    mixer: type[MixerSpec]
    read: Callable[[Sizes, int], MixerSpec]
    channel: ChannelVersion
    flat: Sequence[str]


def _rwkv4(sizes: Sizes, n_layers: int) -> MixerSpec:
    return RWKV4Spec(d_inner=sizes("blocks.0.att.time_decay", 1)[0])


def _rwkv5(sizes: Sizes, n_layers: int) -> MixerSpec:
    return RWKV5Spec(head_dim=sizes("blocks.0.att.time_faaaa", 2)[1])


def _rwkv6(sizes: Sizes, n_layers: int) -> MixerSpec:
    return RWKV6Spec(
        head_dim=sizes("blocks.0.att.time_faaaa", 2)[1],
        mix_rank=sizes("blocks.0.att.time_maa_w2", 3)[1],
        decay_rank=sizes("blocks.0.att.time_decay_w1", 2)[1],
    )


def _rwkv7(sizes: Sizes, n_layers: int) -> MixerSpec:
    return RWKV7Spec(
        head_dim=sizes("blocks.0.att.r_k", 2)[1],
        decay_rank=sizes("blocks.0.att.w1", 2)[1],
        a_rank=sizes("blocks.0.att.a1", 2)[1],
        v_rank=sizes("blocks.1.att.v1", 2)[1] if n_layers > 1 else None,
        gate_rank=sizes("blocks.0.att.g1", 2)[1],
    )


SHIFTS = [f"x_{name}" for name in "rwkvag"]
VERSIONS = {
    f"blocks.0.att.{name}": version
    for name, version in {
        "time_first": Version(RWKV4Spec, _rwkv4, 4, [f"time_mix_{name}" for name in "kvr"]),
        "time_mix_g": Version(RWKV5Spec, _rwkv5, 4, [f"time_mix_{name}" for name in "kvrg"]),
        "time_maa_w1": Version(
            RWKV6Spec, _rwkv6, 6, ["time_decay", *(f"time_maa_{name}" for name in "xwkvrg")]
        ),
        "r_k": Version(RWKV7Spec, _rwkv7, 7, [*SHIFTS, "w0", "a0", "v0", "k_k", "k_a"]),
    }.items()
}
SHARED_RULES = renamed(
    {
        "stem.embedding.@": "emb.@",
        "stem.lm_head.@": "head.@",
        "embed_norm.@": "blocks.0.ln0.@",
        "norm.@": "ln_out.@",
        "blocks.#.mixer_norm.@": "blocks.#.ln1.@",
        "blocks.#.channel_norm.@": "blocks.#.ln2.@",
        "blocks.#.mixer.@": "blocks.#.att.@",
        "blocks.#.channel.@": "blocks.#.ffn.@",
        **{
            f"blocks.#.{ours}.{part}.@": f"blocks.#.{theirs}.{part}.@"
            for ours, theirs in (("mixer", "att"), ("channel", "ffn"))
            for part in ("receptance", "key", "value", "gate", "output", "ln_x")
        },
    }
)


def depth(shapes: Shapes, key: str) -> int:
    """How many layers there are: "blocks.#.ln1.weight" is stored for 0, 1, 2, ..."""
    n_layers = 0
    while key.replace("#", str(n_layers)) in shapes:
        n_layers += 1
    return n_layers


def canonical(spec: ModelSpec) -> ModelSpec:
    """Widths that were left to a rule, written out. The first RWKV-7 layer, which has no use for a
    v_rank, gets that of the second."""
    blocks = []
    v_ranks = [
        b.mixer.ranks(spec.d_model)["v"]
        for b in spec.plain_blocks
        if isinstance(b.mixer, RWKV7Spec)
    ]
    v_ranks = [*(v_ranks[1:2] or [None]), *v_ranks[1:]]
    for block in spec.plain_blocks:
        mixer, channel = block.mixer, block.channel
        if isinstance(mixer, RWKV4Spec):
            mixer = replace(mixer, d_inner=mixer.width(spec.d_model))
        elif isinstance(mixer, RWKV6Spec):
            mix, decay = mixer.ranks(spec.d_model)
            mixer = replace(mixer, mix_rank=mix, decay_rank=decay)
        elif isinstance(mixer, RWKV7Spec):
            w, a, g = (mixer.ranks(spec.d_model)[name] for name in "wag")
            v = v_ranks.pop(0)
            mixer = replace(mixer, decay_rank=w, a_rank=a, v_rank=v, gate_rank=g)
        if isinstance(channel, RWKVChannelSpec):
            channel = replace(channel, hidden=channel.width(spec.d_model))
        blocks.append(replace(block, mixer=mixer, channel=channel))
    return spec.replace(blocks=tuple(blocks))


def same_blocks(spec: ModelSpec, mixer: type[M], version: int) -> tuple[M, RWKVChannelSpec]:
    """The mixer of the last block and the channel, after a look at all blocks.

    Raises:
        CheckpointError: a block is not of this mixer and of rwkv_channel in this version.
    """
    wanted = f"{mixer.kind} with rwkv_channel of version {version}"
    found = []
    for i, block in enumerate(canonical(spec).plain_blocks):
        if not isinstance(block.mixer, mixer) or not isinstance(block.channel, RWKVChannelSpec):
            parts = [part.kind for part in (block.mixer, block.channel) if part is not None]
            raise CheckpointError(f"blocks[{i}] is {' with '.join(parts)}; give {wanted}")
        if block.channel.version != version:
            given = block.channel.version
            raise CheckpointError(f"blocks[{i}].channel.version is {given}; give {wanted}")
        found.append((block.mixer, block.channel))
    return found[-1]


def sizes_of(config: Config, shapes: Shapes) -> Sizes:
    """Shapes by name and number of dimensions; CheckpointError for others."""

    def sizes(name: str, ndim: int) -> Sequence[int]:
        shape = shapes.get(name, ())
        if len(shape) != ndim:
            found = f"is {shape}" if name in shapes else "is missing"
            raise CheckpointError(f"{config.where}: {name} {found}; expected {ndim} dimensions")
        return shape

    return sizes


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    sizes = sizes_of(config, shapes)
    found = [version for marker, version in VERSIONS.items() if marker in shapes]
    if len(found) != 1:
        rule = f"of {', '.join(VERSIONS)} exactly one is expected, {len(found)} are stored"
        raise CheckpointError(f"{config.where}: {rule}")
    (version,) = found
    if any(name.endswith(".att.time_state") for name in shapes):
        rule = (
            "which a model does not; give calls the state of checkpoints.tuned_state(path, model)"
        )
        warnings.warn(f"{config.where}: holds an initial memory (time_state), {rule}", stacklevel=2)
    vocab_size, d_model = sizes("emb.weight", 2)
    n_layers = depth(shapes, "blocks.#.ln1.weight")
    channel = RWKVChannelSpec(sizes("blocks.0.ffn.key.weight", 2)[0], version.channel)
    return ModelSpec(
        d_model=d_model,
        blocks=(BlockSpec(version.read(sizes, n_layers), channel, norm="layer"),) * n_layers,
        stem=Tokens(vocab_size),
        norm="layer",
        norm_eps=NORM_EPS,
        embed_norm=True,
    )


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    by_kind = {version.mixer.kind: version for version in VERSIONS.values()}
    version = by_kind.get(spec.plain_blocks[0].mixer.kind)
    if version is None:
        kind = spec.plain_blocks[0].mixer.kind
        raise CheckpointError(f"blocks[0].mixer is {kind}; the format knows {', '.join(by_kind)}")
    same_blocks(spec, version.mixer, version.channel)
    rules = [Rule(f"blocks.#.mixer.{name}", f"blocks.#.att.{name}", FLAT) for name in version.flat]
    shares = SHARES[version.channel]
    rules += [Rule(f"blocks.#.channel.{name}", f"blocks.#.ffn.{name}", FLAT) for name in shares]
    return [[*rules, *SHARED_RULES]]


register(
    Family(
        name="rwkv_pth",
        spec=_spec,
        layouts=_layouts,
        config=None,
        signature=("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln1.weight", "ln_out.weight"),
        ignored=("blocks.#.att.time_state", *(f"blocks.0.att.v{i}" for i in range(3))),
        canonical=canonical,
        file="model.pth",
    )
)
