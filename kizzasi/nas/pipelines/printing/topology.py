"""What `compiling.topology` makes of a stack, the other way round: layers as a stack's equal blocks
and the words for what stands around them.

Fields that no word says are left out here: who uses the words compiles them.
"""

from __future__ import annotations

from typing import Any

from kizzasi.models import BlockSpec
from kizzasi.nas.pipelines.compiling.topology import PLACES
from kizzasi.nas.pipelines.printing.parts import NAMES, given

SLOWER = ("downsample", "chunked")
READ = {how: {"where": "pre_mixer", "op": how} for how in ("film", "lora", "add")}
READ["kv"] = {"where": "proj_kv", "op": "add"}
WHERE = {at: where for where, at in PLACES.items()}
WHERE |= {"norm": "ln", "q": "q", "v": "v"}


def folded(layers: list[Any]) -> tuple[list[BlockSpec], dict[str, Any]] | None:
    """The blocks of a stack, all equal, and its fields beside `n_layers` and what a block says;
    None if no stack has such layers."""
    words: dict[str, Any] = {}
    loop = [i for i, one in enumerate(layers) if one.kind == "loop"]
    if len(loop) == 1:
        layers, words["recurrence"] = _loop(layers, loop[0])
    elif len(layers) % 2 and layers[len(layers) // 2].kind in SLOWER:
        layers, words["hierarchy"] = _hierarchy(layers)
    if layers[-1].kind == "depth_routed":
        layers, words["depth_router"] = _router(layers)
    if layers[-1].kind == "latent":
        layers, words["cond"] = [*layers[:-1], *layers[-1].body], latent_words(layers[-1])
    if layers[-1].kind == "condition":
        layers, words["cond"] = _conditions(layers)
    plain = isinstance(layers[0], BlockSpec) and not layers[0].sources
    return (layers, words) if plain and all(one == layers[0] for one in layers) else None


def latent_words(layer: Any) -> dict[str, Any]:
    """The cond of a latent."""
    query, form = layer.query, layer.form
    source = {"kind": "pool-mlp", "H": layer.n_bits, "seed": layer.seed or None}
    source |= {"query": query if query != "stream" else None}
    source |= {"form": form if form != "factored" else None}
    ops = []
    for how in layer.inject:
        op = {**READ[how], "r": layer.rank if how == "lora" else None}
        if (at := getattr(layer, f"{how}_at", "stream")) != "stream":
            op["where"] = WHERE[at]
        ops.append(given(op))
    reg = {"kind": "freebits", "kappa": layer.free_bits}
    return {"source": given(source), "reg": reg, "ops": ops}


def _loop(layers: list[Any], i: int) -> tuple[list[Any], dict[str, Any]]:
    loop = layers[i]
    counts = {"prelude": i, "body": len(loop.body), "coda": len(layers) - i - 1}
    schedule: dict[str, Any] = {"backprop": loop.n_backprop}
    if loop.schedule != "fixed":
        least = loop.min_loops if loop.min_loops > 1 else None
        schedule |= {"sigma": loop.sigma, "min": least, "max": loop.max_loops}
    if loop.curriculum != "none":
        schedule |= {"curriculum": loop.curriculum, "warmup_steps": loop.warmup_steps}
    schedule = given(schedule)
    if schedule:
        schedule = {"kind": loop.schedule, **schedule}
    loops = {"train": loop.n_train, "eval": loop.n_loops, "schedule": schedule or None}
    loops |= {"keys": loop.keys if loop.keys != "each" else None}
    loops |= {"tolerance": loop.tolerance or None}
    found = {"adapter": loop.adapter, "noise_std": loop.noise_std or None}
    found |= {"seed": loop.seed or None, "loops": given(loops)}
    found |= {"norm": None if loop.norm is None else NAMES[loop.norm]}
    return [*layers[:i], *loop.body, *layers[i + 1 :]], {**counts, **given(found)}


def _hierarchy(layers: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    levels, rate = [], 1
    while len(layers) % 2 and (one := layers[len(layers) // 2]).kind in SLOWER:
        every = len(layers) // 2
        if one.kind == "chunked":
            level = {"chunk": one.rate, "balance": one.weight}
        else:
            rate *= one.factor
            level = {"downsample": 1 / rate}
            level |= {"pool": "linear"} if one.pooling == "linear" else {}
            level |= {"up_proj": True} if one.upsampling == "linear" else {}
        levels.append({"every": every, **level})
        layers = [*layers[:every], *one.body, *layers[every + 1 :]]
    return layers, {"levels": levels}


def _router(layers: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    routed = [one for one in layers if one.kind == "depth_routed"]
    first, one = len(layers) - len(routed), routed[0]
    kind = "token" if all(len(one.body) == 1 for one in routed) else "layer"
    words = {"kind": kind, "budget": one.capacity, "balance": one.weight}
    words |= {"tau": one.temperature} if one.temperature != 1 else {}
    words |= {"min_layers": first} if first else {}
    return [
        *layers[:first],
        *(b for one in layers[first:] for b in getattr(one, "body", ())),
    ], words


def _conditions(layers: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    ops: list[dict[str, Any]] = []
    first = layers[0]
    kind = getattr(first, "source", "mean")
    source = {"kind": "pool-mlp" if kind == "mean" else kind}
    source |= {"H": getattr(first, "hidden", None), "segment": getattr(first, "segment", None)}
    while all(one.kind == "condition" and len(one.body) == 1 for one in layers):
        op: dict[str, Any] = {"where": WHERE[layers[0].at], "op": layers[0].op}
        groups = layers[0].groups
        share = None if groups is None else "global" if groups == 1 else "per_head"
        ops.insert(0, {**op, **given({"share": share, "r": layers[0].rank})})
        layers = [one.body[0] for one in layers]
    return layers, {"source": given(source), "ops": ops}
