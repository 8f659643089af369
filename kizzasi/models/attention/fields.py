"""Rules of the fields of `AttentionSpec`, by theme."""

from __future__ import annotations

from typing import Literal, Protocol

from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.norm import NormKind
from kizzasi.models.ops.kv_codes import KVQuant
from kizzasi.models.ops.stencil import Stencil
from kizzasi.strict import join, require

Position = Literal["rope", "xpos", "alibi", "relative", "none"]
ROTATED = ("rope", "xpos")


class StencilFields(Protocol):
    """The fields that say which positions a query sees."""

    @property
    def window(self) -> int | None: ...
    @property
    def dilation(self) -> int: ...
    @property
    def block(self) -> int | None: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def n_global(self) -> int: ...
    @property
    def causal(self) -> bool: ...


class PositionFields(Protocol):
    """The fields that say how positions enter the scores."""

    @property
    def position(self) -> Position: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_dims(self) -> int | None: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def xpos_base(self) -> float: ...
    @property
    def n_buckets(self) -> int: ...
    @property
    def max_distance(self) -> int: ...
    @property
    def causal(self) -> bool: ...


class HeadFields(Protocol):
    """The fields of heads and their norms."""

    @property
    def n_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int | None: ...
    @property
    def qk_norm(self) -> Literal[False, True, "full", "head"]: ...
    @property
    def qk_norm_kind(self) -> NormKind: ...


def check_heads(spec: HeadFields, d_model: int, path: str) -> None:
    """Raise SpecError for every rule that the heads break."""
    require(
        spec.head_dim is not None or d_model % spec.n_heads == 0,
        join(path, "n_heads"),
        f"d_model {d_model} is not divisible by {spec.n_heads} heads; "
        "give a divisor of d_model, or head_dim",
    )
    require(
        spec.n_heads % spec.kv_heads == 0,
        join(path, "n_kv_heads"),
        f"{spec.kv_heads} does not divide n_heads {spec.n_heads}; give a divisor",
    )
    layers = ("layer", "layer_unbiased")
    rule = f'"head" scales layer norms alone; give one of {layers} as qk_norm_kind'
    fits = spec.qk_norm != "head" or spec.qk_norm_kind in layers
    require(fits, join(path, "qk_norm"), rule)


def stencil_of(spec: StencilFields) -> Stencil:
    """The fields as the ops read them."""
    reach = spec.window, spec.dilation, spec.block, spec.n_blocks, spec.n_global
    return Stencil(*reach, spec.causal)


def check_stencil(spec: StencilFields, path: str) -> None:
    """Raise SpecError for every rule that the stencil breaks."""
    for name in ("dilation", "n_blocks"):
        value = getattr(spec, name)
        require(value > 0, join(path, name), f"{value} is not positive; give at least 1")
    require(spec.n_global >= 0, join(path, "n_global"), f"{spec.n_global} is negative; give 0")
    if spec.block is not None:
        rule = "not positive; give at least 1"
        require(spec.block > 0, join(path, "block"), f"{spec.block} is {rule}")
        plain = spec.window is None and spec.dilation == 1
        rule = "blocks take neither a window nor a dilation; leave them out, or leave out block"
        require(plain, join(path, "block"), rule)
    rule = f"{spec.n_blocks} blocks of no size; give block too"
    require(spec.block is not None or spec.n_blocks == 1, join(path, "n_blocks"), rule)
    local = spec.window is not None or spec.block is not None
    rule = f"{spec.n_global} positions besides all; give window or block too, or 0"
    require(local or not spec.n_global, join(path, "n_global"), rule)
    special = {"dilation": 1, "block": None, "n_global": 0}
    for name, default in special.items():
        ok = spec.causal or getattr(spec, name) == default
        require(ok, join(path, name), "an encoder knows windows alone; leave it out")


def check_positions(spec: PositionFields, head_dim: int, path: str) -> None:
    """Raise SpecError for every rule that the positions of heads of this width break."""
    if spec.position in ROTATED:
        _check_rotation(spec, head_dim, path)
    else:
        unused = spec.rope_dims is None and spec.rope_scaling is None
        rule = f"{spec.position!r} takes no rope_dims and no rope_scaling; leave them out"
        require(unused, join(path, "position"), rule)
    rule = f"{spec.xpos_base} is not positive; 512 is usual"
    require(spec.xpos_base > 0, join(path, "xpos_base"), rule)
    exact = spec.n_buckets // (2 if spec.causal else 4)
    rule = f"{spec.n_buckets} buckets are too few; give an even number from 4 on, 32 is usual"
    require(spec.n_buckets % 2 == 0 and exact > 0, join(path, "n_buckets"), rule)
    rule = f"{spec.max_distance} is not above the {exact} distances with a bucket of their own"
    require(spec.max_distance > exact, join(path, "max_distance"), rule)
    if spec.position == "xpos":
        rule = "an encoder looks ahead, where xPos grows instead of fading; use rope"
        require(spec.causal, join(path, "position"), rule)


def _check_rotation(spec: PositionFields, head_dim: int, path: str) -> None:
    require(spec.rope_theta > 1, join(path, "rope_theta"), f"{spec.rope_theta} is not above 1")
    n = head_dim if spec.rope_dims is None else spec.rope_dims
    require(
        2 <= n <= head_dim and n % 2 == 0,
        join(path, "rope_dims"),
        f"{n} of {head_dim} entries of a head cannot be rotated in pairs; "
        "give an even number up to the head's width, or another head_dim",
    )
    if spec.rope_scaling is not None:
        spec.rope_scaling.check(n, join(path, "rope_scaling"))


class SourceFields(StencilFields, PositionFields, Protocol):
    """The fields that say what keys and values are made of."""

    @property
    def kv_from(self) -> int | None: ...
    @property
    def memory_from(self) -> int | None: ...
    @property
    def qkv_rank(self) -> int | None: ...
    @property
    def value_glu(self) -> bool: ...
    @property
    def kv_quant(self) -> KVQuant: ...
    @property
    def kv_group(self) -> int | None: ...


def check_sources(spec: SourceFields, path: str) -> None:
    """Raise SpecError for every rule that what is read of other layers breaks."""
    own = spec.qkv_rank is None and not spec.value_glu
    for name in ("kv_from", "memory_from"):
        if getattr(spec, name) is not None:
            rule = "keys and values come from elsewhere; leave out qkv_rank and value_glu"
            require(own, join(path, name), rule)
    both = spec.kv_from is not None and spec.memory_from is not None
    rule = "keys and values that are read are made of nothing; leave one of the two out"
    require(not both, join(path, "memory_from"), rule)


def check_codes(spec: SourceFields, path: str) -> None:
    """Raise SpecError for every rule that codes of keys and values break."""
    rule = "an encoder remembers nothing; leave it out"
    require(spec.causal or spec.kv_quant == "none", join(path, "kv_quant"), rule)
    if spec.kv_group is not None:
        rule = f"{spec.kv_group} tokens are no group; give 2 or more, 64 is usual"
        require(spec.kv_group > 1, join(path, "kv_group"), rule)
        rule = "keys are not coded; give kv_quant too"
        require(spec.kv_quant != "none", join(path, "kv_group"), rule)
        rule = "no channels are coded in fp8; give int8 or nf4, or leave kv_group out"
        require(spec.kv_quant != "fp8", join(path, "kv_group"), rule)


def lendable(spec: SourceFields, n_kv_heads: int, head_dim: int) -> tuple[tuple[str, object], ...]:
    """What a reader's queries must have in common with the keys and values they meet."""
    names = ("window", "dilation", "block", "n_blocks", "n_global", "causal", "position")
    names += ("kv_quant", "kv_group")
    if spec.position in ROTATED:
        names += ("rope_theta", "rope_dims", "rope_scaling")
    if spec.position == "xpos":
        names += ("xpos_base",)
    sizes = ("n_kv_heads", n_kv_heads), ("head_dim", head_dim)
    return *sizes, *((name, getattr(spec, name)) for name in names)
