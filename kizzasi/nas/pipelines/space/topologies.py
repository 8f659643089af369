"""Moves of topologies: layers inside layers, and layers that read others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kizzasi.models import BlockSpec, LayerSpec, MixerSpec, ModelSpec
from kizzasi.nas.pipelines.space.tree import RefusedError, on_a_part
from kizzasi.nas.spaces.rng import Xorshift64


def hierarchy(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A few layers run at a lower rate, or one that did runs at the full one."""
    around = {"factor": rng.choice((2, 4)), "upsampling": rng.choice(("repeat", "linear"))}
    return _around(spec, rng, "downsample", around)


def chunking(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A few layers see one token for every chunk, whose ends they learn, or no longer."""
    return _around(spec, rng, "chunked", {"rate": rng.choice((2.0, 4.0, 6.0))})


def depth_router(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Tokens may pass a few layers by, or no longer."""
    return _around(spec, rng, "depth_routed", {"capacity": rng.choice((0.25, 0.5, 0.75))})


def recurrence(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A few layers run in a loop, or no longer."""
    adapter = rng.choice(("identity", "residual", "concat_linear"))
    return _around(spec, rng, "loop", {"n_loops": rng.choice((2, 3)), "adapter": adapter})


def recurrence_loops(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A loop runs once more, or once less."""
    step = rng.choice((-1, 1))
    change = lambda part: replace(part, n_loops=max(1, part.n_loops + step))  # noqa: E731
    return on_a_part(spec, rng, ("loop",), change)


def recurrence_noise(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A loop starts from noise, from more of it, or from none."""

    def change(part: Any) -> Any:
        left = [std for std in (0.0, 0.02, 0.05, 0.1) if std != part.noise_std]
        return replace(part, noise_std=rng.choice(left))

    return on_a_part(spec, rng, ("loop",), change)


def recurrence_curriculum(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A loop's iterates grow in training, otherwise, or are all there from its start."""

    def change(part: Any) -> Any:
        if part.trained == 1:
            raise RefusedError("a single iterate cannot grow")
        ways = (("none", 0), ("linear", 100), ("sqrt", 100))
        way, steps = rng.choice([way for way in ways if way[0] != part.curriculum])
        return replace(part, curriculum=way, warmup_steps=steps)

    return on_a_part(spec, rng, ("loop",), change)


def condition(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A layer is turned by a summary of the past, or no longer."""
    op = rng.choice(("film", "add", "scale", "lora"))
    source = rng.choice(("mean", "ema", "segment"))
    around = {"op": op, "at": rng.choice(("in", "out", "norm", "q", "v")), "source": source}
    around |= {"rank": 2 if op == "lora" else None, "hidden": rng.choice((None, 8))}
    around |= {"segment": rng.choice((8, 32)) if source == "segment" else None}
    return _around(spec, rng, "condition", around)


def latent(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """The upper layers read bits that an encoder chooses, or no longer."""
    blocks = spec.blocks
    inside = [i for i, layer in enumerate(blocks) if layer.encodes]
    if inside:
        i = inside[0]
        body: Any = blocks[i]
        return spec.replace(blocks=(*blocks[:i], *body.body, *blocks[i + 1 :]))
    i = rng.choice(range(len(blocks)))
    ways: list[dict[str, Any]] = [{"inject": ["add"]}, {"inject": ["film", "lora"], "rank": 4}]
    for at in blocks[i].taps(spec.d_model):
        ways.append({"inject": ["film", "lora"], "rank": 4, "lora_at": at})
    if blocks[i].crosses:
        ways.append({"inject": ["kv"], "query": "learned"})
    heads = [n for n in (8, 4, 2, 1) if spec.d_model % (2 * n) == 0]
    if not heads:
        raise RefusedError(f"d_model: {spec.d_model} is odd; heads of an encoder are rotated")
    mixer = {"kind": "attention", "n_heads": heads[0], "causal": False}
    encoder = {"mixer": mixer, "channel": {"kind": "swiglu", "hidden": 2 * spec.d_model}}
    given = {"kind": "latent", "encoder": [encoder], "free_bits": rng.choice((0.125, 0.5))}
    given |= {"body": [layer.to_dict() for layer in blocks[i:]], **rng.choice(ways)}
    return spec.replace(blocks=(*blocks[:i], LayerSpec.from_dict(given)))


def cross_skip(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Attention reads the keys and values of an earlier layer, or makes its own again."""
    return _reading(spec, rng, "kv_from")


def memory(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Attention looks at the stream after an earlier layer, or at its own again."""
    return _reading(spec, rng, "memory_from")


def share(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A layer takes the weights of an earlier one."""
    found = [i for i, layer in enumerate(spec.blocks) if isinstance(layer, BlockSpec)]
    if len(found) < 2:
        raise RefusedError("there is no earlier layer")
    j = rng.choice(found[1:])
    i = rng.choice([k for k in found if k < j])
    return _put_layer(spec, j, LayerSpec.from_dict({"kind": "shared", "layer": i}))


def kv_policy(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Keys and values are remembered in fewer bits, or in all of them."""

    def change(part: Any) -> Any:
        data = part.to_dict()
        left = [q for q in ("none", "int8", "fp8", "nf4") if q != data["kv_quant"]]
        data |= {"kv_quant": rng.choice(left), "kv_group": None}
        return MixerSpec.from_dict(data)

    return on_a_part(spec, rng, ("attention",), change)


def _around(spec: ModelSpec, rng: Xorshift64, kind: str, fields: dict[str, Any]) -> ModelSpec:
    """A few layers stand inside another, or come out of it."""
    inside = [i for i, layer in enumerate(spec.blocks) if layer.kind == kind]
    if inside and rng.next_f64() < 0.5:
        i = rng.choice(inside)
        body: Any = spec.blocks[i]
        return spec.replace(blocks=(*spec.blocks[:i], *body.body, *spec.blocks[i + 1 :]))
    n = len(spec.blocks)
    i = rng.choice(range(n))
    j = i + rng.choice((1, 2)) if i + 2 <= n else i + 1
    body = [layer.to_dict() for layer in spec.blocks[i:j]]
    given = {name: value for name, value in fields.items() if value is not None}
    made = LayerSpec.from_dict({"kind": kind, "body": body, **given})
    return spec.replace(blocks=(*spec.blocks[:i], made, *spec.blocks[j:]))


def _reading(spec: ModelSpec, rng: Xorshift64, name: str) -> ModelSpec:
    readers = [
        i
        for i, layer in enumerate(spec.blocks)
        if i and isinstance(layer, BlockSpec) and layer.mixer.kind == "attention"
    ]
    if not readers:
        raise RefusedError("no layer of attention stands behind another layer")
    i = rng.choice(readers)
    block: Any = spec.blocks[i]
    now: dict[str, int | None] = {"kv_from": None, "memory_from": None}
    if getattr(block.mixer, name) is None:
        now[name] = rng.choice(range(i))
    return _put_layer(spec, i, replace(block, mixer=replace(block.mixer, **now)))


def _put_layer(spec: ModelSpec, i: int, layer: Any) -> ModelSpec:
    return spec.replace(blocks=(*spec.blocks[:i], layer, *spec.blocks[i + 1 :]))
