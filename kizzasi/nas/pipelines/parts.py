"""What a layer is made of, as a pipeline writes it: mixers, channels, caches, conditions, norms.

A field that is None was not written. What a field means is in `compiling`.

Source, Differs: as in `document`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from kizzasi.models import ChannelSpec, MixerSpec
from kizzasi.strict import Registered, Strict, join, require, unknown_name

# EvoForge's three, and two of the house's own.
NormName = Literal["LayerNorm", "RMSNorm", "ScaleNorm", "layer_unbiased", "rms_plus_one"]
PosName = Literal["rope", "alibi", "relbias", "learned", "xpos", "none"]


def bounded(
    least: float | None = None, most: float | None = None, *, above: float | None = None
) -> Any:
    """Default None of a number that has bounds when it is given."""
    named = {"minimum": least, "maximum": most, "exclusiveMinimum": above}
    return field(default=None, metadata={k: v for k, v in named.items() if v is not None})


@dataclass(frozen=True)
class LongRope(Strict):
    """alpha, beta: EvoForge's, without a meaning. divisors: one for each rotated pair."""

    alpha: float | None = None
    beta: float | None = None
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scaling(Strict):
    """How rotary positions are stretched.

    Args:
        type: the method.
        factor: context after extension / context of training.
        longrope: its numbers.
        original_context: tokens before extension; train.ctx_len / factor where it is not given.
    """

    type: Literal["ntk", "linear", "yarn", "longrope"]
    factor: float | None = bounded(1)
    longrope: LongRope | None = None
    original_context: int | None = bounded(2)


@dataclass(frozen=True)
class Rope(Strict):
    """theta: base of the frequencies. dims: entries of a head that are rotated."""

    theta: float | None = bounded(above=1)
    dims: int | None = bounded(2)
    scaling: Scaling | None = None


@dataclass(frozen=True)
class Pos(Strict):
    """How attention knows positions."""

    kind: PosName
    rope: Rope | None = None


@dataclass(frozen=True)
class Stencil(Strict):
    """Which keys a query sees; never a later one.

    Args:
        kind: "local" and "sliding" are windows.
        window: positions, the query's own included.
        dilation, block, stride, globals: of the kinds that read them.
        query, key: stages that a cross attention joins.
    """

    kind: Literal["full", "local", "sliding", "dilated", "block", "ring", "hybrid", "cross"]
    window: int | None = bounded(1)
    dilation: int | None = bounded(1)
    block: int | None = bounded(1)
    stride: int | None = bounded(1)
    globals: int | None = bounded(0)
    query: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Kernel(Strict):
    """Random features in the place of the exponential."""

    name: Literal["favor", "gaussian", "laplace"] | None = None
    features: int | None = bounded(1)
    redraw: int | None = bounded(0)
    orthogonal: bool | None = None


@dataclass(frozen=True)
class Softmax(Strict):
    """How scores become weights.

    Args:
        type: "scaled" takes qk_scale; "kernel" takes kernel.
        qk_scale: factor of the scores, or "sqrt_d" for head_dim^-0.5.
        qk_norm: normalise queries and keys first.
        softcap: c in c tanh(z / c).
        kernel: see there.
    """

    type: Literal["standard", "scaled", "kernel"] | None = None
    qk_scale: float | str | None = None
    qk_norm: Literal["none", "rms", "layer"] | None = None
    softcap: float | None = bounded(above=0)
    kernel: Kernel | None = None


@dataclass(frozen=True)
class Projection(Strict):
    """Low-rank keys and values."""

    type: Literal["low_rank", "none"]
    rank: int | None = bounded(1)
    shared: bool | None = None


@dataclass(frozen=True)
class Own(Strict):
    """A mixer or feed-forward part of the house's kinds, written with its own fields."""

    spec: MixerSpec | ChannelSpec

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_dict()

    def _data(self, *, brief: bool) -> dict[str, Any]:
        return self.spec._data(brief=brief)


class Open(Strict):
    """Base of parts that may also be one of the house's kinds."""

    family: ClassVar[type[Registered]]
    kinds: ClassVar[tuple[str, ...]]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: str = "") -> Any:
        require(isinstance(data, Mapping), path, f"expected a mapping, got {data!r:.80}")
        kind, known = data.get("kind"), cls.family.known()
        if kind in known:
            return Own(cls.family.from_dict(data, path))  # pyright: ignore[reportArgumentType]
        if kind not in cls.kinds:
            found = unknown_name(kind, [*cls.kinds, *known])
            require(False, join(path, "kind"), f"{kind!r} {found}")
        return super().from_dict(data, path)


@dataclass(frozen=True)
class Mixer(Open):
    """A sequence mixer: one of EvoForge's four, or any kind of the house.

    Args:
        kind: see there.
        heads: of Attention and Retention.
        groups: key and value heads of Attention.
        head_dim: width of a head; d_model / heads where it is not given.
        stencil, softmax, projection, value_glu: of Attention.
        pos: of Attention, in the place of the model's.
        chunk, mode: of Retention, read and without effect: every form gives one result.
        d_state, expand: of SSM: states per channel, and channels / d_model.
        kernel_len: of LongConv.
    """

    family: ClassVar[type[Registered]] = MixerSpec
    kinds: ClassVar[tuple[str, ...]] = ("Attention", "Retention", "SSM", "LongConv")
    kind: Literal["Attention", "Retention", "SSM", "LongConv"]
    heads: int | None = bounded(1)
    groups: int | None = bounded(1)
    head_dim: int | None = bounded(1)
    stencil: Stencil | None = None
    softmax: Softmax | None = None
    pos: PosName | None = None
    chunk: int | None = bounded(1)
    mode: Literal["parallel", "recurrent"] | None = None
    d_state: int | None = bounded(1)
    expand: float | None = bounded(above=0)
    kernel_len: int | None = bounded(1)
    projection: Projection | None = None
    value_glu: bool | None = None


@dataclass(frozen=True)
class Router(Strict):
    """A token's choice among mixers: how many, how sharp, and the weight of the balance loss."""

    topk: int | None = bounded(1)
    temp: float | None = bounded(above=0)
    balance: float | None = bounded(0)


@dataclass(frozen=True)
class MixUnit(Strict):
    """One mixer ("single"), several side by side ("par"), or several to choose from ("route")."""

    kind: Literal["single", "par", "route"]
    mixer: Mixer | None = None
    choices: tuple[Mixer, ...] = ()
    merge: Literal["Add", "WeightedAdd", "Concat"] | None = None
    router: Router | None = None


@dataclass(frozen=True)
class FFN(Open):
    """The feed-forward part.

    Args:
        kind: "dense", "moe", or any channel of the house.
        mult: inner width / d_model.
        act: "swiglu" and "geglu" are gated.
        experts, topk, capacity: of moe: how many, how many work on a token, and the capacity
            factor.
    """

    family: ClassVar[type[Registered]] = ChannelSpec
    kinds: ClassVar[tuple[str, ...]] = ("dense", "moe")
    kind: Literal["dense", "moe"]
    mult: float | None = bounded(above=0)
    act: Literal["relu", "gelu", "silu", "swiglu", "geglu"] | None = None
    experts: int | None = bounded(1)
    topk: int | None = bounded(1)
    capacity: float | None = bounded(above=0)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: str = "") -> Any:
        # "moe" is also a kind of the house: EvoForge's is the one with EvoForge's fields.
        ours = isinstance(data, Mapping) and data.get("kind") == "moe"
        if ours and data.keys() <= {"kind", "mult", "act", "experts", "topk", "capacity"}:
            return Strict.from_dict.__func__(cls, data, path)  # pyright: ignore[reportFunctionMemberAccess]
        return super().from_dict(data, path)


@dataclass(frozen=True)
class Source(Strict):
    """What a condition or a latent is made of.

    Args:
        kind: a pooled past, one that fades ("ema"), or the last finished segment.
        H: hidden width between a summary and what it turns, or the bits of a latent.
        segment: tokens of a segment.
        query: of a latent: what its encoder's stream begins as, the stream or one learned vector.
        form: of a latent: a weight for each bit, or a row for each pattern of bits.
        seed: of a latent's bits where they are drawn.
    """

    kind: Literal["pool-mlp", "segment", "ema"]
    H: int | None = bounded(1)
    segment: int | None = bounded(1)
    query: Literal["stream", "learned"] | None = None
    form: Literal["factored", "table"] | None = None
    seed: int | None = bounded(0)


@dataclass(frozen=True)
class Reg(Strict):
    """Free bits: kappa bits per token of a latent cost nothing."""

    kind: Literal["freebits", "none"]
    kappa: float | None = bounded(0)


@dataclass(frozen=True)
class Op(Strict):
    """Where and how a condition acts, or bits are read: on what the layer reads ("pre_mixer"), adds
    ("post_mixer"), or becomes ("token"), on what its norms give ("ln"), on its queries ("q",
    "proj_q") or values ("v", "proj_v"). "proj_kv": where keys and values are made, by bits that are
    added in the first layer alone."""

    where: Literal[
        "pre_mixer", "post_mixer", "ln", "proj_q", "proj_v", "q", "v", "token", "proj_kv"
    ]
    op: Literal["film", "add", "scale", "lora"]
    share: Literal["global", "per_channel", "per_head"] | None = None
    r: int | None = bounded(1)


@dataclass(frozen=True)
class Cond(Strict):
    """A condition of every layer on its past."""

    source: Source | None = None
    reg: Reg | None = None
    ops: tuple[Op, ...] = ()


@dataclass(frozen=True)
class Update(Strict):
    """How a latent cache is written: "linear", of each token by itself; "ema", a mean of the tokens
    so far, kept of one in freq, each token weighing tau times what its successor does."""

    kind: Literal["linear", "ema"]
    freq: int | None = bounded(1)
    tau: float | None = bounded(0, 1)


@dataclass(frozen=True)
class LatentCache(Strict):
    """A compressed cache of dim numbers a token, in `heads` parts, of which a head reads one."""

    dim: int | None = bounded(1)
    heads: int | None = bounded(1)
    update: Update | None = None


@dataclass(frozen=True)
class KVPolicy(Strict):
    """What attention keeps of the past, and in which form.

    Args:
        cache: how long.
        window: positions of a window or ring.
        quant: bits.
        group: tokens whose keys are coded together, channel by channel; else each by itself.
        evict: EvoForge's, without a meaning.
        latent: of a compressed cache.
    """

    cache: Literal["full", "window", "ring", "none", "latent"]
    window: int | None = bounded(1)
    quant: Literal["none", "fp8", "nf4", "int8"] | None = None
    group: int | None = bounded(2)
    evict: str | None = None
    latent: LatentCache | None = None


@dataclass(frozen=True)
class Residual(Strict):
    """Where norms stand, and branches.

    Args:
        kind: norms before branches ("single"), on both sides ("dual"), or after, with a scaled
            stream ("deepnet").
        pre_ln, post_ln: of "dual": which there are.
        scale: of "dual": of what a branch adds; of "deepnet": of the stream.
        beside: the feed-forward part stands beside the mixer, with a norm of its own ("separate")
            or the mixer's ("shared").
    """

    kind: Literal["single", "dual", "deepnet"]
    pre_ln: bool | None = None
    post_ln: bool | None = None
    scale: float | None = bounded(above=0)
    beside: Literal["shared", "separate"] | None = None
