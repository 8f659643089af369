"""What a stack does with its layers: conditions, routed depth, loops, lower rates.

A stack's equal layers pass, in this order,

    cond           every layer stands in a `condition` for each op
    depth_router   "token": layers after min_layers are routed each by itself; "layer": as one
    recurrence     prelude, a `loop` of the body, coda
    hierarchy      from `every` layers off either end inwards, at the level's rate; nested

As there is no order between a recurrence and a hierarchy, a stack has one of them at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kizzasi.models import LayerSpec
from kizzasi.nas.pipelines.compiling.channels import NORMS
from kizzasi.nas.pipelines.compiling.latents import NOT_THERE, TURNED, halved, is_latent
from kizzasi.nas.pipelines.document import (
    DepthRouter,
    Hierarchy,
    Level,
    Loops,
    LoopSchedule,
    Recurrence,
    Stack,
)
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.nas.pipelines.parts import Cond, Op

PLACES = {"pre_mixer": "in", "post_mixer": "out", "token": "stream"}
DEFAULT_SEGMENT = 64


def arranged(
    layers: list[Any], stack: Stack, d_model: int, path: str, findings: Findings
) -> list[Any]:
    """The layers of a stack with its topologies around them."""
    if stack.cond is not None and is_latent(stack.cond):
        others = (stack.depth_router, stack.recurrence, stack.hierarchy)
        if all(other is None for other in others):
            return halved(layers, stack.cond, d_model, f"{path}.cond", findings)
        rule = "a latent parts a stack in two, and so do a depth_router, recurrence, or hierarchy"
        findings.drop(f"{path}.cond", rule, "leave one out, or give each a module")
    elif stack.cond is not None:
        summary = _summary(stack.cond, f"{path}.cond", findings)
        heads = _heads(stack)
        turns = [
            _Turn(op, heads, d_model, f"{path}.cond.ops[{i}]")
            for i, op in enumerate(stack.cond.ops)
        ]
        for turn in turns:
            layers = [_turned(one, turn, summary, findings) for one in layers]
    if stack.depth_router is not None:
        layers = _routed(layers, stack.depth_router, f"{path}.depth_router", findings)
    if stack.recurrence is not None and stack.hierarchy is not None:
        rule = "a stack has a recurrence or a hierarchy; which one is inside, nobody says"
        findings.drop(f"{path}.hierarchy", rule, "leave one out, or give each a module")
    if stack.recurrence is not None:
        return _looped(layers, stack.recurrence, path, findings)
    if stack.hierarchy is not None:
        return _lowered(layers, stack.hierarchy, f"{path}.hierarchy", findings)
    return layers


def layer(kind: str, body: list[Any], **fields: Any) -> Any:
    """A layer around others; fields that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    data = {"kind": kind, "body": [one.to_dict() for one in body], **given}
    return LayerSpec.from_dict(data)


# ------------------------------------------------------------------------- conditions


def _heads(stack: Stack) -> int | None:
    unit = stack.mix_unit
    mixers = () if unit is None else (unit.mixer, *unit.choices)
    return next((heads for m in mixers if (heads := getattr(m, "heads", None))), None)


def _summary(cond: Cond, path: str, findings: Findings) -> dict[str, Any]:
    """The fields of a condition that say what it is made of."""
    source = cond.source
    for name in ("query", "form", "seed"):
        if source is not None and getattr(source, name) is not None:
            findings.drop(f"{path}.source.{name}", "a summary has no bits; freebits make a latent")
    if cond.reg is not None:
        rule = "a summary of the past is known, so there are no bits to pay for"
        findings.drop(f"{path}.reg", rule, "leave it out, or give freebits for a latent")
    if not cond.ops:
        findings.add(f"{path}.ops", "it is needed", "give an op, or leave cond out", (path, DROP))
    if source is None:
        return {}
    if source.kind == "segment":
        tokens = source.segment
        if tokens is None:
            where = f"{path}.source.segment"
            tokens = findings.set(where, "'segment' needs its tokens", DEFAULT_SEGMENT)
        return {"source": "segment", "segment": tokens, "hidden": source.H}
    if source.segment is not None:
        findings.drop(f"{path}.source.segment", f"{source.kind!r} has no segments")
    return {"source": "ema" if source.kind == "ema" else None, "hidden": source.H}


@dataclass(frozen=True)
class _Turn:
    """An op, the heads of the mixer if it has some, the width of the stream, and where it is."""

    op: Op
    heads: int | None
    d_model: int
    path: str


def _turned(one: Any, turn: _Turn, summary: dict[str, Any], findings: Findings) -> Any:
    op, path, heads = turn.op, turn.path, turn.heads
    at = PLACES.get(op.where) or TURNED.get(op.where)
    if at is None:
        rule = f"{op.where!r}: bits are added where keys and values are made, and no summary"
        at = PLACES[findings.set(f"{path}.where", rule, "pre_mixer")]
    elif at not in PLACES.values():
        tap = one.taps(turn.d_model).get(at)
        if tap is None:
            rule = f"{op.where!r}: {NOT_THERE[at]}"
            at = PLACES[findings.set(f"{path}.where", rule, "pre_mixer")]
        elif at != "norm":
            heads = tap.n_heads
    rank, groups = op.r, None
    if op.op == "lora":
        if op.share is not None:
            findings.drop(f"{path}.share", "'lora' shares by its rank")
        if rank is None:
            rank = findings.set(f"{path}.r", "'lora' needs it", 4)
    else:
        if rank is not None:
            findings.drop(f"{path}.r", f"{op.op!r} has no rank")
        if op.share == "per_head" and heads is None:
            findings.set(f"{path}.share", "no mixer has heads", "per_channel")
        groups = {"global": 1, "per_head": heads}.get(op.share or "")
        rank = None
    return layer("condition", [one], op=op.op, at=at, groups=groups, rank=rank, **summary)


# ------------------------------------------------------------------------- depth


def _routed(layers: list[Any], router: DepthRouter, path: str, findings: Findings) -> list[Any]:
    if router.kind == "none":
        for name in ("budget", "tau", "min_layers", "balance"):
            if getattr(router, name) is not None:
                findings.drop(f"{path}.{name}", "'none' routes nothing")
        return layers
    budget = router.budget
    if budget is None or budget == 1:
        rule = f"{router.kind!r} needs it" if budget is None else "all tokens need no router"
        budget = findings.set(f"{path}.budget", rule, 0.5)
    first = router.min_layers or 0
    if first >= len(layers):
        rule = f"{first} of {len(layers)} layers leave none to route"
        first = findings.set(f"{path}.min_layers", rule, max(0, len(layers) - 1))
    rest = layers[first:]
    bodies = [[one] for one in rest] if router.kind == "token" else [rest]
    return layers[:first] + [
        layer("depth_routed", body, capacity=budget, weight=router.balance, temperature=router.tau)
        for body in bodies
    ]


def _looped(layers: list[Any], recurrence: Recurrence, path: str, findings: Findings) -> list[Any]:
    where = f"{path}.recurrence"
    first, last = recurrence.prelude, recurrence.prelude + recurrence.body
    total = last + recurrence.coda
    if total != len(layers):
        rule = f"prelude, body and coda are {total} layers, and n_layers is {len(layers)}"
        findings.set(f"{path}.n_layers", rule, total)
        layers = (layers * total)[:total]
    adapter = recurrence.adapter
    loop = {"adapter": adapter, "noise_std": recurrence.noise_std or None}
    loop |= {"norm": None if recurrence.norm is None else NORMS[recurrence.norm]}
    if recurrence.seed is not None and not recurrence.noise_std:
        findings.drop(f"{where}.seed", "a loop without noise draws nothing")
    else:
        loop["seed"] = recurrence.seed
    loop |= _loops(recurrence.loops or Loops(), adapter or "identity", f"{where}.loops", findings)
    body = layers[first:last]
    return [*layers[:first], layer("loop", body, **loop), *layers[last:]]


def _loops(loops: Loops, adapter: str, path: str, findings: Findings) -> dict[str, Any]:
    """How many times, in evaluation and in training."""
    schedule, ends = loops.schedule, {"keys": loops.keys, "tolerance": loops.tolerance or None}
    n = loops.eval or loops.train
    if n is None:
        n = findings.set(f"{path}.eval", "it is needed", 2)
    if loops.tolerance and loops.keys != "first":
        rule = "a token stops where its later iterates leave no keys"
        findings.set(f"{path}.keys", rule, "first")
    trained = loops.train
    if schedule is None:
        return {**ends, "n_loops": n, "n_train": trained if trained != n else None}
    where = f"{path}.schedule"
    found: dict[str, Any] = {**ends, "n_loops": n, "schedule": schedule.kind}
    if schedule.backprop is not None and adapter == "identity":
        rule = "without an adapter the layers before the loop would have no gradient"
        findings.drop(f"{where}.backprop", rule)
    elif schedule.backprop is not None:
        found["n_backprop"] = schedule.backprop
    if schedule.kind == "fixed":
        for name in ("mean", "sigma", "min", "max"):
            if getattr(schedule, name) is not None:
                findings.drop(f"{where}.{name}", "'fixed' draws nothing")
    else:
        trained = _mean(schedule, trained, where, findings)
        found |= _bounds(schedule, where, findings)
    found |= _curriculum(schedule, trained or n, where, findings)
    return {**found, "n_train": trained if trained != n else None}


def _mean(schedule: LoopSchedule, trained: int | None, path: str, findings: Findings) -> int | None:
    """What the number of drawn iterates follows."""
    mean = schedule.mean
    if mean is None:
        return trained
    if trained is not None and mean != trained:
        rule = f"{mean:g}, but loops.train is {trained}"
        findings.set(f"{path}.mean", rule, float(trained), "give one of the two")
        return trained
    if mean != round(mean):
        rule = f"{mean:g}: iterates on average are a whole number, as they are in evaluation"
        mean = findings.set(f"{path}.mean", rule, float(max(1, round(mean))))
    return max(1, round(mean))


def _bounds(schedule: LoopSchedule, path: str, findings: Findings) -> dict[str, Any]:
    low, high = schedule.min, schedule.max
    if low is not None and high is not None and low > high:
        low = findings.set(f"{path}.min", f"{low} is more than max {high}", high)
    return {"sigma": schedule.sigma, "min_loops": low, "max_loops": high}


def _curriculum(schedule: LoopSchedule, n: int, path: str, findings: Findings) -> dict[str, Any]:
    """How the number of iterates grows in training."""
    kind, steps = schedule.curriculum or "none", schedule.warmup_steps
    if kind != "none" and n == 1:
        kind = findings.set(f"{path}.curriculum", "a single iterate cannot grow", "none")
    if kind == "none":
        if steps:
            findings.drop(f"{path}.warmup_steps", "no curriculum grows over it")
        return {}
    if not steps:
        steps = findings.set(f"{path}.warmup_steps", f"{kind!r} needs it", 100)
    return {"curriculum": kind, "warmup_steps": steps}


# ------------------------------------------------------------------------- rates


def _lowered(layers: list[Any], hierarchy: Hierarchy, path: str, findings: Findings) -> list[Any]:
    if not hierarchy.levels:
        findings.drop(f"{path}.levels", "empty", "give a level, or leave the hierarchy out")
        return layers
    factors, before = [], 1
    for i, level in enumerate(hierarchy.levels):
        where = f"{path}.levels[{i}]"
        if level.chunk is None:
            factors.append(_factor(level, before, where, findings))
            before *= factors[-1]
            if level.balance is not None:
                findings.drop(f"{where}.balance", "a rate that is given needs no loss")
            continue
        factors.append(1)
        for name in ("downsample", "pool", "up_proj"):
            if getattr(level, name) is not None:
                findings.drop(f"{where}.{name}", "a chunk's ends are learned, and so is its rate")
    inner = layers
    depth = 0
    around: list[tuple[list[Any], list[Any]]] = []
    for i, level in enumerate(hierarchy.levels):
        skip = level.every - depth
        if skip < min(1, i) or 2 * skip >= len(inner):
            rule = f"{level.every} layers off either end of {len(layers)} leave nothing between"
            if skip < min(1, i):
                rule = f"{level.every} is not beyond the level before"
            findings.drop(f"{path}.levels[{i}]", rule, "give another number, or leave it out")
            factors = factors[:i]
            break
        around.append((inner[:skip], inner[len(inner) - skip :]))
        inner, depth = inner[skip : len(inner) - skip], level.every
    for (head, tail), level, factor in reversed(
        list(zip(around, hierarchy.levels, factors, strict=False))
    ):
        inner = [*head, _slower(inner, level, factor), *tail]
    return inner


def _slower(inner: list[Any], level: Level, factor: int) -> Any:
    if level.chunk is not None:
        return layer("chunked", inner, rate=level.chunk, weight=level.balance)
    up = "linear" if level.up_proj else None
    return layer("downsample", inner, factor=factor, pooling=level.pool, upsampling=up)


def _factor(level: Level, before: int, path: str, findings: Findings) -> int:
    """Of a level within the one before, which runs at the rate 1 / before."""
    rate = level.downsample
    if rate is None:
        rate = findings.set(f"{path}.downsample", "it is needed", 0.5 / before)
    times = 1 / (rate * before)
    near = max(2, round(times))
    if abs(times - near) > 1e-6:
        rule = f"{rate:g} is not one in a whole number, 2 or more, of the level before"
        findings.set(f"{path}.downsample", rule, 1 / (near * before))
    return near
