"""Mixers of a document as mixers of the house.

Glossary
    place   where a unit stands: its path, the width, and what its stack says about positions and
            caches, each with the path where that is written
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import MixerSpec
from kizzasi.nas.pipelines.document import KVPolicy, Mixer, MixUnit, Own, Pos, Softmax, Stencil
from kizzasi.nas.pipelines.misfits import DROP, Findings

READ_BY_KIND = {
    "Attention": (
        "heads",
        "groups",
        "head_dim",
        "stencil",
        "softmax",
        "pos",
        "projection",
        "value_glu",
    ),
    "Retention": ("heads", "head_dim", "chunk", "mode"),
    "SSM": ("d_state", "expand"),
    "LongConv": ("kernel_len",),
}
READ_BY_STENCIL = {
    "full": (),
    "local": ("window",),
    "sliding": ("window",),
}
DEFAULT_WINDOW, DEFAULT_HEAD = 256, 64


@dataclass(frozen=True)
class Place:
    """See the glossary.

    Args:
        path: of the mix unit.
        d_model: width.
        ctx_len: window of training.
        pos, pos_path, kv, kv_path: of the stack.
        kv_inherited: a module has it from the model, and may have no use for it.
    """

    path: str
    d_model: int
    ctx_len: int
    pos: Pos | None = None
    pos_path: str = ""
    kv: KVPolicy | None = None
    kv_path: str = ""
    kv_inherited: bool = False


def mixer_of(unit: MixUnit, place: Place, findings: Findings) -> MixerSpec | None:
    """The mixer of a unit; None if something is missing that only its author knows."""
    path = place.path
    several = unit.kind != "single"
    if several:
        if unit.mixer is not None:
            findings.drop(f"{path}.mixer", f"{unit.kind!r} mixes its choices", "leave it out")
        if not unit.choices:
            findings.add(f"{path}.choices", f"{unit.kind!r} needs choices", "give at least one")
            return None
    elif unit.mixer is None:
        findings.add(f"{path}.mixer", "'single' needs a mixer", "give one")
        return None
    elif unit.choices:
        findings.drop(f"{path}.choices", "'single' has one mixer", "leave it out, or use 'par'")
    if unit.router is not None and unit.kind != "route":
        findings.drop(f"{path}.router", f"{unit.kind!r} chooses nothing", "leave it out")
    given: tuple[Any, ...] = unit.choices if several else (unit.mixer,)
    names = [f"{path}.choices[{i}]" if several else f"{path}.mixer" for i in range(len(given))]
    _unread(unit, given, place, findings)
    made = [one_mixer(m, place, name, findings) for m, name in zip(given, names, strict=True)]
    mixers = [mixer for mixer in made if mixer is not None]
    if len(mixers) < len(made):
        return None
    if unit.kind == "single":
        if unit.merge is not None:
            findings.drop(f"{path}.merge", "one mixer has nothing to merge", "leave it out")
        return mixers[0]
    return (_parallel if unit.kind == "par" else _routed)(unit, mixers, path, findings)


def _unread(unit: MixUnit, given: Any, place: Place, findings: Findings) -> None:
    """Positions and caches that no mixer of the unit reads."""
    attends = [m for m in given if isinstance(m, Mixer) and m.kind == "Attention"]
    if place.pos is not None and place.pos.kind != "none":
        reads = any(m.pos in (None, place.pos.kind) for m in attends)
        reads = reads or any(isinstance(m, Mixer) and m.kind == "Retention" for m in given)
        if not reads:
            rule = f"no mixer of {place.path} reads positions {place.pos.kind!r}"
            findings.drop(place.pos_path, rule, "leave it out")
    if place.kv is not None and not attends and not place.kv_inherited:
        findings.drop(place.kv_path, f"{place.path} has no attention and so no cache")


def _parallel(unit: MixUnit, mixers: list[Any], path: str, findings: Findings) -> MixerSpec:
    if unit.merge is None:
        findings.set(f"{path}.merge", "'par' needs it", "Add")
    combine = {"Add": "sum", "WeightedAdd": "weighted", "Concat": "concat"}[unit.merge or "Add"]
    return _made({"kind": "parallel", "mixers": mixers, "combine": combine})


def _routed(unit: MixUnit, mixers: list[Any], path: str, findings: Findings) -> MixerSpec:
    if unit.merge not in (None, "Add"):
        rule = f"a router adds its choices by their weights, which is not {unit.merge!r}"
        findings.set(f"{path}.merge", rule, "Add")
    router = unit.router
    top_k = 1 if router is None or router.topk is None else router.topk
    if router is None or router.topk is None:
        findings.set(f"{path}.router.topk", "'route' needs it", 1)
    if top_k > len(mixers):
        rule = f"{top_k} of {len(mixers)} choices"
        top_k = findings.set(f"{path}.router.topk", rule, len(mixers))
    more = {} if router is None else {"temperature": router.temp, "balance_weight": router.balance}
    chosen = {name: value for name, value in more.items() if value is not None}
    return _made({"kind": "routed", "mixers": mixers, "top_k": top_k, **chosen})


def one_mixer(mixer: Mixer | Own, place: Place, path: str, findings: Findings) -> MixerSpec | None:
    """One mixer; None if something is missing."""
    if isinstance(mixer, Own):
        assert isinstance(mixer.spec, MixerSpec)
        return mixer.spec if _fits(mixer.spec, place.d_model, path, findings) else None
    for name in (n for names in READ_BY_KIND.values() for n in names):
        if getattr(mixer, name) is not None and name not in READ_BY_KIND[mixer.kind]:
            findings.drop(f"{path}.{name}", f"{mixer.kind} does not read it")
    makers: dict[str, Callable[[Mixer, Place, str, Findings], dict[str, Any]]] = {
        "Attention": _attention,
        "Retention": _retention,
        "SSM": _ssm,
        "LongConv": _long_conv,
    }
    found = len(findings)
    data = makers[mixer.kind](mixer, place, path, findings)
    spec = _made({name: value for name, value in data.items() if value is not None})
    known = len(findings) > found  # what is found already need not be said again
    return spec if known or _fits(spec, place.d_model, path, findings) else None


def _made(data: Mapping[str, Any]) -> MixerSpec:
    return MixerSpec.from_dict(data)


def _fits(spec: MixerSpec, d_model: int, path: str, findings: Findings) -> bool:
    try:
        spec.check(d_model, path)
    except SpecError as error:
        where, _, rule = str(error).partition(": ")
        findings.add(where, rule, "")
        return False
    return True


# --------------------------------------------------------------------------- the four kinds


def _attention(m: Mixer, place: Place, path: str, findings: Findings) -> dict[str, Any]:
    heads = _heads(m, place.d_model, 1, path, findings)
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
        "window": _window(m.stencil, place, path, findings),
        **_softmax(m.softmax, head_dim, path, findings),
        **_positions(m, head_dim, place, path, findings),
        **_later(m, path, findings),
    }


def _later(m: Mixer, path: str, findings: Findings) -> dict[str, Any]:
    if m.projection is not None and m.projection.type != "none":
        findings.drop(f"{path}.projection", "low-rank keys and values are not built")
    if m.value_glu:
        findings.drop(f"{path}.value_glu", "gated values are not built")
    return {}


def _heads(m: Mixer, d_model: int, even: int, path: str, findings: Findings) -> int:
    """Heads that divide the width, into `even` entries or a multiple of them."""
    if m.heads is None:
        near = _nearest_divisor(d_model // even, max(1, d_model // DEFAULT_HEAD))
        return findings.set(f"{path}.heads", f"{m.kind} needs heads", near)
    if m.head_dim is not None and m.kind == "Attention":
        return m.heads
    if d_model % (m.heads * even):
        width = "a whole, even width" if even == 2 else "a whole width"
        rule = f"{m.heads} heads of d_model {d_model} have not {width}"
        near = _nearest_divisor(d_model // even, m.heads) if d_model % even == 0 else 1
        return findings.set(f"{path}.heads", rule, near)
    return m.heads


def _nearest_divisor(n: int, wanted: int) -> int:
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    return min(divisors, key=lambda k: (abs(k - wanted), k))


def _window(stencil: Stencil | None, place: Place, path: str, findings: Findings) -> int | None:
    where, kv = f"{path}.stencil", place.kv
    window = None
    if stencil is not None:
        kind = stencil.kind
        if kind not in READ_BY_STENCIL:
            findings.set(f"{where}.kind", f"{kind!r} is not built", "full")
        else:
            _only(stencil, READ_BY_STENCIL[kind], f"{kind!r}", where, findings)
            window = stencil.window if "window" in READ_BY_STENCIL[kind] else None
            if window is None and "window" in READ_BY_STENCIL[kind]:
                usual = min(DEFAULT_WINDOW, place.ctx_len)
                window = findings.set(f"{where}.window", f"{kind!r} needs it", usual)
    return window if kv is None else _cached(kv, window, place, path, findings)


def _cached(
    kv: KVPolicy, window: int | None, place: Place, path: str, findings: Findings
) -> int | None:
    """The window of a layer under a cache policy."""
    where = place.kv_path
    if kv.cache in ("none", "latent"):
        why = {
            "none": "every model steps from a state; without a cache the past would be run anew",
            "latent": "a compressed cache is not built; the mixer mla has one",
        }
        findings.set(f"{where}.cache", why[kv.cache], "full")
    if kv.latent is not None:
        findings.drop(f"{where}.latent", "a compressed cache is not built; the mixer mla has one")
    if kv.evict is not None:
        findings.drop(f"{where}.evict", f"{kv.evict!r}: the oldest leave, and no others")
    if kv.quant not in (None, "none"):
        findings.drop(f"{where}.quant", f"caches in {kv.quant} are not built")
    bounded = kv.cache in ("window", "ring")
    if not bounded:
        if kv.window is not None:
            findings.drop(f"{where}.window", f"a cache {kv.cache!r} has no window")
        return window
    if kv.window is None:
        usual = window or min(DEFAULT_WINDOW, place.ctx_len)
        findings.set(f"{where}.window", f"a cache {kv.cache!r} needs it", usual)
        return usual
    if window is not None and window < kv.window:
        rule = f"{kv.window} positions are kept, of which {path} sees {window}"
        findings.set(f"{where}.window", rule, window)
    return kv.window if window is None else min(window, kv.window)


def _softmax(
    softmax: Softmax | None, head_dim: int, path: str, findings: Findings
) -> dict[str, Any]:
    if softmax is None:
        return {}
    where = f"{path}.softmax"
    if softmax.type == "kernel" or softmax.kernel is not None:
        rule = "random features are not built"
        findings.add(
            where,
            rule,
            "leave type and kernel out",
            (f"{where}.type", DROP),
            (f"{where}.kernel", DROP),
        )
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
    if kind not in ("rope", "alibi", "none"):
        where = f"{path}.pos" if m.pos else f"{where}.kind"
        findings.set(where, f"positions {kind!r} are not built", "rope")
        return {"position": "rope"}
    if pos is not None and pos.rope is not None and pos.kind != "rope":
        findings.drop(f"{where}.rope", f"{pos.kind!r} rotates nothing")
    rope = pos.rope if pos is not None and pos.kind == "rope" else None
    if kind != "rope" or rope is None:
        return {"position": kind}
    dims, where = rope.dims, f"{where}.rope"
    if dims is not None and (dims > head_dim or dims % 2):
        rule = f"{dims} of the {head_dim} entries of a head cannot be rotated in pairs"
        near = min(dims, head_dim) // 2 * 2
        remedy = f"give an even number up to {head_dim}, or {path} a head_dim of {dims}"
        dims = findings.set(f"{where}.dims", rule, near, remedy)
    scaling = _scaling(rope.scaling, dims or head_dim, place, f"{where}.scaling", findings)
    return {
        "position": "rope",
        "rope_theta": rope.theta,
        "rope_dims": dims,
        "rope_scaling": scaling,
    }


def _scaling(
    scaling: Any, n_rotated: int, place: Place, path: str, findings: Findings
) -> dict[str, Any] | None:
    if scaling is None:
        return None
    factor = scaling.factor
    if factor is None:
        factor = findings.set(f"{path}.factor", f"{scaling.type!r} needs it", 1.0)
    if scaling.type == "ntk" and n_rotated == 2:
        rule = "ntk leaves the first of all frequencies alone, and 2 rotated entries have no other"
        findings.set(f"{path}.type", rule, "linear")
    found: dict[str, Any] = {"method": scaling.type, "factor": factor}
    trained = scaling.type in ("yarn", "longrope")
    if trained:
        before = scaling.original_context or max(2, round(place.ctx_len / factor))
        found["original_context"] = before
    elif scaling.original_context is not None:
        findings.drop(f"{path}.original_context", f"{scaling.type!r} does not read it")
    longrope = scaling.longrope
    if scaling.type != "longrope":
        if longrope is not None:
            findings.drop(f"{path}.longrope", f"{scaling.type!r} does not read it")
        return found
    n = n_rotated // 2
    found["divisors"] = () if longrope is None else longrope.divisors
    if longrope is None or len(longrope.divisors) != n:
        low = 1.0 if longrope is None or longrope.alpha is None else longrope.alpha
        high = factor if longrope is None or longrope.beta is None else longrope.beta
        ramp = [low * (high / low) ** (i / max(1, n - 1)) for i in range(n)]
        rule = "longrope has a divisor for each pair of rotated entries, and no alpha and beta"
        findings.add(
            f"{path}.longrope",
            rule,
            f"give divisors, {n} numbers",
            (f"{path}.longrope", {"divisors": ramp}),
        )
        found["divisors"] = ramp
    elif longrope.alpha is not None or longrope.beta is not None:
        rule = "its divisors say everything"
        findings.set(f"{path}.longrope", rule, {"divisors": list(longrope.divisors)})
    return found


def _retention(m: Mixer, place: Place, path: str, findings: Findings) -> dict[str, Any]:
    heads = _heads(m, place.d_model, 2, path, findings)
    if m.head_dim is not None and m.head_dim * heads != place.d_model:
        rule = f"{heads} heads of Retention share d_model {place.d_model}"
        findings.drop(f"{path}.head_dim", rule)
    elif m.head_dim is not None:
        findings.drop(f"{path}.head_dim", "d_model and heads say it already")
    theta = None
    if place.pos is not None and place.pos.kind == "rope" and place.pos.rope is not None:
        theta = place.pos.rope.theta
    return {"kind": "retention", "n_heads": heads, "rope_theta": theta}


def _ssm(m: Mixer, place: Place, path: str, findings: Findings) -> dict[str, Any]:
    expand = m.expand
    if expand is not None and not math.isclose(expand * place.d_model % 1, 0, abs_tol=1e-9):
        rule = f"{expand} times d_model {place.d_model} is no whole number"
        near = max(1, round(expand * place.d_model)) / place.d_model
        expand = findings.set(f"{path}.expand", rule, near)
    return {"kind": "mamba", "d_state": m.d_state, "expand": expand}


def _long_conv(m: Mixer, place: Place, path: str, findings: Findings) -> dict[str, Any]:
    return {"kind": "long_conv", "max_len": m.kernel_len}


def _only(value: Any, names: tuple[str, ...], who: str, path: str, findings: Findings) -> None:
    """Find the fields that are given beside those of `names` and the kind."""
    for name in type(value).__dataclass_fields__:
        if name not in ("kind", "type", *names) and getattr(value, name) is not None:
            findings.drop(f"{path}.{name}", f"{who} does not read it")
