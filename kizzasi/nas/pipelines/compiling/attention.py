"""Attention of a document as attention of the house: stencil, cache, softmax, positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kizzasi.nas.pipelines.compiling.latent_cache import latent_attention
from kizzasi.nas.pipelines.compiling.place import DEFAULT_HEAD, Place, heads_of, only
from kizzasi.nas.pipelines.compiling.stretching import stretched
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.nas.pipelines.parts import Kernel, KVPolicy, Mixer, Softmax, Stencil

READ_BY_STENCIL: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "local": ("window",),
    "sliding": ("window",),
    "dilated": ("window", "dilation"),
    "block": ("block",),
    "ring": ("block",),
    "hybrid": ("window", "globals"),
    "cross": (),
}
POSITIONS = {"relbias": "relative", "learned": "none"}  # the others have the same names
ROTATED = ("rope", "xpos")
DEFAULT_WINDOW = 256
KERNEL = "kernel_attention"


def attention(m: Mixer, place: Place, path: str, findings: Findings) -> dict[str, Any]:
    """The fields of attention, by softmax or by random features."""
    if by_features(m):
        return kernel_attention(m, place, path, findings)
    if place.kv is not None and place.kv.cache == "latent":
        made = latent_attention(m, place, path, findings)
        if made is not None:
            return made
    heads = heads_of(m, place.d_model, 1, path, findings)
    head_dim = m.head_dim or place.d_model // heads
    groups = m.groups
    if groups is not None and heads % groups:
        rule = f"{groups} groups do not divide {heads} heads"
        near = max(g for g in range(1, heads + 1) if heads % g == 0 and g <= groups)
        groups = findings.set(f"{path}.groups", rule, near)
    return {
        "kind": "attention",
        "n_heads": heads,
        "n_kv_heads": groups,
        "head_dim": m.head_dim,
        **_stencil(m.stencil, place, path, findings),
        **_softmax(m.softmax, head_dim, path, findings),
        **_positions(m, head_dim, place, path, findings),
        **_projection(m, path, findings),
        "value_glu": m.value_glu,
    }


def kernel_attention(m: Mixer, place: Place, path: str, findings: Findings) -> dict[str, Any]:
    """Attention by random features: a memory of constant size, so no stencil and no cache."""
    assert m.softmax is not None, "asked"
    kernel, where = m.softmax.kernel or Kernel(), f"{path}.softmax"
    heads = heads_of(m, place.d_model, 1, path, findings)
    features = kernel.features
    if features is None:
        features = findings.set(f"{where}.kernel.features", "'kernel' needs it", 64)
    for name in ("groups", "stencil", "pos", "projection", "value_glu"):
        if getattr(m, name) is not None:
            findings.drop(f"{path}.{name}", "attention by random features does not read it")
    only(m.softmax, ("kernel",), "'kernel'", where, findings)
    return {
        "kind": KERNEL,
        "n_heads": heads,
        "head_dim": m.head_dim,
        "feature": kernel.name,
        "n_features": features,
        "orthogonal": kernel.orthogonal,
        "redraw": kernel.redraw,
    }


def reach_of(m: Any) -> float:
    """Positions that a mixer's queries see, 0 of what keeps no keys and values by position."""
    if not isinstance(m, Mixer) or m.kind != "Attention" or by_features(m):
        return 0
    kind = "full" if m.stencil is None else m.stencil.kind
    if m.stencil is None or "window" not in READ_BY_STENCIL[kind]:
        return 0 if "block" in READ_BY_STENCIL[kind] else math.inf
    return m.stencil.window or 0


def by_features(m: Any) -> bool:
    """Whether this is attention by random features."""
    return isinstance(m, Mixer) and m.softmax is not None and m.softmax.type == "kernel"


def _projection(m: Mixer, path: str, findings: Findings) -> dict[str, Any]:
    given = m.projection
    if given is None:
        return {}
    if given.type == "none":
        only(given, (), "'none'", f"{path}.projection", findings)
        return {}
    rank = given.rank
    if rank is None:
        near = max(1, _usual_width(m) // 2)
        rank = findings.set(f"{path}.projection.rank", "'low_rank' needs it", near)
    return {"qkv_rank": rank, "qkv_shared": given.shared}


def _usual_width(m: Mixer) -> int:
    """A usual width of all heads."""
    return (m.heads or 1) * (m.head_dim or DEFAULT_HEAD)


def _stencil(
    stencil: Stencil | None, place: Place, path: str, findings: Findings
) -> dict[str, Any]:
    """The fields that say which positions a query sees, and how they are remembered."""
    where = f"{path}.stencil"
    kind = "full" if stencil is None else stencil.kind
    if kind == "cross":
        remedy = "leave it out, and name the other stage in mem_from"
        findings.add(where, "'cross' joins two stages", remedy, (where, DROP))
    seen: dict[str, Any] = {}
    if stencil is not None:
        reads = READ_BY_STENCIL[kind]
        only(stencil, reads, f"{kind!r}", where, findings)
        usual = {"window": min(DEFAULT_WINDOW, place.ctx_len), "dilation": 2, "block": 64}
        usual["globals"] = 4
        for name in reads:
            value = getattr(stencil, name)
            if value is None:
                value = findings.set(f"{where}.{name}", f"{kind!r} needs it", usual[name])
            seen[name] = value
    fields: dict[str, Any] = {
        "window": seen.get("window"),
        "dilation": seen.get("dilation"),
        "block": seen.get("block"),
        "n_global": seen.get("globals"),
        "n_blocks": 2 if kind == "ring" else None,
    }
    return {**fields, **_cached(place, fields, path, findings)}


def _cached(
    place: Place, fields: Mapping[str, Any], path: str, findings: Findings
) -> dict[str, Any]:
    """What a cache policy changes of the fields of a layer."""
    kv, where = place.kv, place.kv_path
    if kv is None:
        return {}
    _refused(kv, where, findings)
    found: dict[str, Any] = {} if kv.quant in (None, "none") else {"kv_quant": kv.quant}
    if kv.group is not None:
        if kv.quant in ("int8", "nf4"):
            found["kv_group"] = kv.group
        else:
            findings.drop(f"{where}.group", f"{kv.quant or 'none'!r} codes no channels")
    if kv.cache not in ("window", "ring"):
        if kv.window is not None:
            findings.drop(f"{where}.window", f"a cache {kv.cache!r} has no window")
        return found
    if fields["block"] is not None:
        full, drop = (f"{where}.cache", "full"), (f"{where}.window", DROP)
        rule = f"the blocks of {path} say what is kept"
        findings.add(where, rule, "give the cache 'full'", full, drop)
        return found
    seen, window = fields["window"], kv.window
    if window is None:
        usual = seen or min(DEFAULT_WINDOW, place.ctx_len)
        window = findings.set(f"{where}.window", f"a cache {kv.cache!r} needs it", usual)
    elif seen is not None and seen < window:
        if seen >= place.reach:  # else another mixer of the unit sees more
            rule = f"{window} positions are kept, of which {path} sees {seen}"
            findings.set(f"{where}.window", rule, seen)
        window = seen
    return {**found, "window": window}


def _refused(kv: KVPolicy, where: str, findings: Findings) -> None:
    """Find the policies that attention with keys and values of its own has not."""
    if kv.cache == "none":
        rule = "a model steps from what its state remembers, and is handed no earlier tokens"
        findings.set(f"{where}.cache", rule, "full")
    if kv.latent is not None and kv.cache != "latent":
        findings.drop(f"{where}.latent", f"a cache {kv.cache!r} has no latent")
    if kv.evict is not None:
        findings.drop(f"{where}.evict", f"{kv.evict!r}: the oldest leave, and no others")


def _softmax(
    softmax: Softmax | None, head_dim: int, path: str, findings: Findings
) -> dict[str, Any]:
    if softmax is None:
        return {}
    where = f"{path}.softmax"
    if softmax.kernel is not None:
        findings.drop(f"{where}.kernel", "only the type 'kernel' reads it")
    found: dict[str, Any] = {"softcap": softmax.softcap}
    scale = softmax.qk_scale
    if softmax.type == "scaled" and scale is None:
        scale = findings.set(f"{where}.qk_scale", "'scaled' needs it", head_dim**-0.5)
    if isinstance(scale, str):
        if scale != "sqrt_d":
            rule = f"{scale!r} is neither a number nor 'sqrt_d'"
            findings.set(f"{where}.qk_scale", rule, "sqrt_d")
        scale = None  # the usual one
    elif scale is not None and scale <= 0:
        scale = findings.set(f"{where}.qk_scale", f"{scale} is not above 0", "sqrt_d") and None
    found["scale"] = scale
    if softmax.qk_norm in ("rms", "layer"):
        found |= {"qk_norm": True, "qk_norm_kind": softmax.qk_norm}
    return found


def _positions(
    m: Mixer, head_dim: int, place: Place, path: str, findings: Findings
) -> dict[str, Any]:
    pos, where = place.pos, place.pos_path
    kind = m.pos or ("none" if pos is None else pos.kind)
    if pos is not None and pos.rope is not None and pos.kind not in ROTATED:
        findings.drop(f"{where}.rope", f"{pos.kind!r} rotates nothing")
    rope = pos.rope if pos is not None and pos.kind == kind and kind in ROTATED else None
    if rope is None:
        return {"position": POSITIONS.get(kind, kind)}
    dims, where = rope.dims, f"{where}.rope"
    if dims is not None and (dims > head_dim or dims % 2):
        rule = f"{dims} of the {head_dim} entries of a head cannot be rotated in pairs"
        near = min(dims, head_dim) // 2 * 2
        remedy = f"give an even number up to {head_dim}, or {path} a head_dim of {dims}"
        dims = findings.set(f"{where}.dims", rule, near, remedy)
    scaling = stretched(rope.scaling, dims or head_dim, place, f"{where}.scaling", findings)
    return {
        "position": kind,
        "rope_theta": rope.theta,
        "rope_dims": dims,
        "rope_scaling": scaling,
    }
