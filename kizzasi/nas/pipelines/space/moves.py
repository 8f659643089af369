"""The named moves: what each changes, on any model. All draw their chance from `rng`.

A move takes a valid spec and returns another one, which may break a rule: whoever makes the move
checks it. Where it cannot be made, it raises RefusedError with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kizzasi.models import BlockSpec, ChannelSpec, MixerSpec, ModelSpec
from kizzasi.nas.pipelines.space.fields import any_field
from kizzasi.nas.pipelines.space.topologies import (
    chunking,
    condition,
    cross_skip,
    depth_router,
    hierarchy,
    kv_policy,
    latent,
    memory,
    recurrence,
    recurrence_curriculum,
    recurrence_loops,
    recurrence_noise,
    share,
)
from kizzasi.nas.pipelines.space.tree import (
    RefusedError,
    joined,
    on_a_layer,
    on_a_part,
    runs,
)
from kizzasi.nas.spaces.resize import at_width
from kizzasi.nas.spaces.rng import Xorshift64

Move = Callable[[ModelSpec, Xorshift64], ModelSpec]
HEADED = ("attention", "retention", "gla", "gated_delta", "lightning")
EVERY = 2**16  # positions, where a window is to grow beyond its end


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


# ------------------------------------------------------------------------- attention's numbers


def heads_up(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """The next larger number of heads that divides the width."""
    return on_a_part(spec, rng, HEADED, lambda part: _heads(part, spec.d_model, 1))


def heads_down(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """The next smaller number of heads that divides the width."""
    return on_a_part(spec, rng, HEADED, lambda part: _heads(part, spec.d_model, -1))


def _heads(part: Any, d_model: int, way: int) -> Any:
    left = [n for n in _divisors(d_model) if (n - part.n_heads) * way > 0]
    if not left:
        raise RefusedError(f"{part.n_heads} heads: no divisor of {d_model} lies beyond")
    heads = min(left, key=lambda n: abs(n - part.n_heads))
    if part.kind != "attention":
        return replace(part, n_heads=heads)
    groups = part.n_kv_heads
    if groups is not None and heads % groups:
        groups = max(g for g in _divisors(heads) if g <= groups)
    width = d_model // heads if part.head_dim is None else part.head_dim
    dims = part.rope_dims if part.rope_dims is None else min(part.rope_dims, width // 2 * 2)
    return replace(part, n_heads=heads, n_kv_heads=groups, rope_dims=dims)


def groups(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Another number of key and value heads."""

    def change(part: Any) -> Any:
        now = part.n_heads if part.n_kv_heads is None else part.n_kv_heads
        left = [g for g in _divisors(part.n_heads) if g != now]
        if not left:
            raise RefusedError("one head has one group")
        return replace(part, n_kv_heads=rng.choice(left))

    return on_a_part(spec, rng, ("attention",), change)


def rope_dims(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Another share of every head is rotated."""

    def change(part: Any) -> Any:
        width = spec.d_model // part.n_heads if part.head_dim is None else part.head_dim
        left = [n for n in range(2, width + 1, 2) if n != (part.rope_dims or width)]
        if part.position != "rope" or not left:
            raise RefusedError("nothing is rotated, or all that can be")
        return replace(part, rope_dims=rng.choice(left), rope_scaling=None)

    return on_a_part(spec, rng, ("attention",), change)


def stencil(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A window where there was none, or the whole past."""

    def change(part: Any) -> Any:
        window = rng.choice((16, 32, 64, 128)) if part.window is None else None
        return replace(part, window=window)

    return on_a_part(spec, rng, ("attention",), change)


def window(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A window half as long again, or two thirds of it."""

    def change(part: Any) -> Any:
        if part.window is None:
            raise RefusedError("there is no window")
        longer = part.window * 3 // 2 if rng.next_f64() < 0.5 else part.window * 2 // 3
        return replace(part, window=min(EVERY, max(1, longer, part.window == 1 and 2)))

    return on_a_part(spec, rng, ("attention",), change)


def position(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Rotary positions, ALiBi, or none."""

    def change(part: Any) -> Any:
        left = [kind for kind in ("rope", "alibi", "none") if kind != part.position]
        return replace(part, position=rng.choice(left), rope_dims=None, rope_scaling=None)

    return on_a_part(spec, rng, ("attention",), change)


def qk_norm(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Queries and keys normalised, or not."""
    change = lambda part: replace(part, qk_norm=not part.qk_norm)  # noqa: E731
    return on_a_part(spec, rng, ("attention",), change)


# ------------------------------------------------------------------------- mixers and channels


def to_par(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A mixer gets a second one beside it, whose output is added."""
    return on_a_layer(spec, rng, lambda layer: _joined_by(layer, _new_mixer(spec, rng), "parallel"))


def to_route(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A mixer becomes one of two that every token chooses from."""
    return on_a_layer(spec, rng, lambda layer: _joined_by(layer, _new_mixer(spec, rng), "routed"))


def _joined_by(layer: Any, other: Any, kind: str) -> Any:
    mixer: Any = _block(layer).mixer
    several = mixer.mixers if mixer.kind in ("parallel", "routed") else (mixer,)
    if len(several) > 3:
        raise RefusedError("four mixers are side by side already")
    made = MixerSpec.from_dict({"kind": kind, "mixers": [m.to_dict() for m in (*several, other)]})
    return replace(layer, mixer=made)


def to_single(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Of several mixers one stays."""
    keep = lambda part: rng.choice(part.mixers)  # noqa: E731
    return on_a_part(spec, rng, ("parallel", "routed"), keep)


def router_temp(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Sharper or softer choices."""
    factor = rng.choice((0.8, 1.25))
    change = lambda part: replace(part, temperature=part.temperature * factor)  # noqa: E731
    return on_a_part(spec, rng, ("routed", "sequence_routed"), change)


def router_topk(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """One more or one fewer makes a token's output."""

    def change(part: Any) -> Any:
        most = part.n_experts if part.kind == "moe" else len(part.mixers)
        left = [k for k in (part.top_k - 1, part.top_k + 1) if 1 <= k <= most]
        if not left:
            raise RefusedError("there is one to choose from")
        return replace(part, top_k=rng.choice(left))

    return on_a_part(spec, rng, ("routed", "sequence_routed", "moe"), change)


def ffn_mult(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A channel's inner width a tenth up or down, or by half."""

    def change(part: Any) -> Any:
        now = part.hidden or (
            8 * -(-spec.d_model // 3) if part.kind == "swiglu" else 4 * spec.d_model
        )
        return replace(part, hidden=max(1, round(now * rng.choice((0.67, 0.9, 1.1, 1.5)))))

    return on_a_part(spec, rng, ("mlp", "swiglu"), change)


def activation(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Another activation, or a gate in the place of a plain perceptron."""
    names = ("relu", "gelu", "silu", "relu2")

    def change(part: Any) -> Any:
        other = {"mlp": "swiglu", "swiglu": "mlp"}[part.kind]
        kind = other if rng.next_f64() < 0.5 else part.kind
        left = [name for name in names if name != part.activation or kind != part.kind]
        data = {"kind": kind, "hidden": part.hidden, "activation": rng.choice(left)}
        return ChannelSpec.from_dict(data)

    return on_a_part(spec, rng, ("mlp", "swiglu"), change)


def swap_mixer(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Another mixer in the place of one."""
    swap = lambda layer: replace(_block(layer), mixer=_new_mixer(spec, rng))  # noqa: E731
    return on_a_layer(spec, rng, swap)


def swap_channel(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Another channel, or none."""
    hidden = max(1, round(spec.d_model * rng.choice((1.0, 2.0, 4.0))))
    options: tuple[Any, ...] = (
        None,
        {"kind": "mlp", "hidden": hidden},
        {"kind": "swiglu", "hidden": hidden},
        {"kind": "moe", "n_experts": 4, "top_k": rng.choice((1, 2)), "hidden": hidden // 2 or 1},
    )
    data = rng.choice(options)
    channel = None if data is None else ChannelSpec.from_dict(data)
    return on_a_layer(spec, rng, lambda layer: replace(_block(layer), channel=channel))


def _block(layer: Any) -> BlockSpec:
    if not isinstance(layer, BlockSpec):
        raise RefusedError("no plain layer")
    return layer


def _new_mixer(spec: ModelSpec, rng: Xorshift64) -> MixerSpec:
    """One of EvoForge's four, or of those that the model has already."""
    heads = [n for n in _divisors(spec.d_model) if spec.d_model // n >= 4 and n <= 16] or [1]
    even = [n for n in heads if spec.d_model % (2 * n) == 0]
    options: list[dict[str, Any]] = [
        {"kind": "attention", "n_heads": rng.choice(heads), "window": rng.choice((None, 32, 128))},
        {"kind": "mamba", "d_state": rng.choice((8, 16, 32)), "expand": rng.choice((1.0, 2.0))},
        {"kind": "long_conv", "max_len": rng.choice((32, 64, 128))},
    ]
    if even:
        options.append({"kind": "retention", "n_heads": rng.choice(even)})
    options += [b.mixer.to_dict() for b in spec.blocks if isinstance(b, BlockSpec)]
    return MixerSpec.from_dict(rng.choice(options))


# ------------------------------------------------------------------------- layers and the stream


def d_model(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Another width; hidden widths and heads follow."""
    step = 8 if spec.d_model >= 32 else 2
    wider = round(spec.d_model * rng.choice((0.75, 0.875, 1.125, 1.25)) / step) * step
    if wider in (0, spec.d_model):
        raise RefusedError(f"no width near {spec.d_model}")
    return at_width(spec, wider)


def n_layers(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """One layer more or fewer in a module."""
    whole = runs(spec)
    i = rng.choice(range(len(whole)))
    longer = rng.next_f64() < 0.5
    whole[i] = [*whole[i], whole[i][0]] if longer else whole[i][1:]
    return joined(spec, whole)


def insert(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A new layer somewhere: a copy of one, with another mixer."""
    blocks = list(spec.blocks)
    i = rng.choice(range(len(blocks) + 1))
    like = rng.choice(blocks)
    if isinstance(like, BlockSpec):
        like = replace(like, mixer=_new_mixer(spec, rng))
    return spec.replace(blocks=(*blocks[:i], like, *blocks[i:]))


def delete(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """A layer less."""
    i = rng.choice(range(len(spec.blocks)))
    return joined(spec, [[*spec.blocks[:i], *spec.blocks[i + 1 :]]])


def swap_stages(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Two modules change places."""
    whole = runs(spec)
    if len(whole) < 2:
        raise RefusedError("there is one module")
    i, j = rng.choice(range(len(whole))), rng.choice(range(len(whole)))
    whole[i], whole[j] = whole[j], whole[i]
    return joined(spec, whole)


def norm(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Another norm everywhere, or in a module."""
    kind = rng.choice([k for k in ("rms", "layer", "scale") if k != spec.norm])
    if rng.next_f64() < 0.5:
        return on_a_layer(spec, rng, lambda layer: replace(_block(layer), norm=kind))
    blocks = tuple(replace(b, norm=kind) if isinstance(b, BlockSpec) else b for b in spec.blocks)
    return spec.replace(blocks=blocks, norm=kind)


def residual(spec: ModelSpec, rng: Xorshift64) -> ModelSpec:
    """Norms before, after, or on both sides."""

    def change(layer: Any) -> Any:
        block = _block(layer)
        return replace(
            block, norm_at=rng.choice([k for k in ("pre", "post", "both") if k != block.norm_at])
        )

    return on_a_layer(spec, rng, change)


MOVES: Mapping[str, Move] = {
    move.__name__: move
    for move in (
        heads_up,
        heads_down,
        groups,
        rope_dims,
        stencil,
        window,
        position,
        qk_norm,
        to_par,
        to_route,
        to_single,
        router_temp,
        router_topk,
        ffn_mult,
        activation,
        swap_mixer,
        swap_channel,
        d_model,
        n_layers,
        insert,
        delete,
        swap_stages,
        norm,
        residual,
        hierarchy,
        chunking,
        depth_router,
        recurrence,
        recurrence_loops,
        recurrence_noise,
        recurrence_curriculum,
        condition,
        latent,
        cross_skip,
        memory,
        share,
        kv_policy,
        any_field,
    )
}
