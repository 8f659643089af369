"""Mixers of a document as mixers of the house."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import MixerSpec
from kizzasi.nas.pipelines.compiling.attention import attention, by_features, reach_of
from kizzasi.nas.pipelines.compiling.place import Place, heads_of
from kizzasi.nas.pipelines.misfits import Findings
from kizzasi.nas.pipelines.parts import Mixer, MixUnit, Own

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
    place = replace(place, reach=max(map(reach_of, given)))
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
    softmaxes = [m for m in given if isinstance(m, Mixer) and m.kind == "Attention"]
    attends = [m for m in softmaxes if not by_features(m)]
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
        "Attention": attention,
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


def _retention(m: Mixer, place: Place, path: str, findings: Findings) -> dict[str, Any]:
    heads = heads_of(m, place.d_model, 2, path, findings)
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
