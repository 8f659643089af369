"""What a layer's norm, queries or values become where another layer turns them.

    z   what the norm, or the projection, gives
    x   what the projection reads; of a norm, z itself
    c   what turns it: a summary, or the bits of a latent

    film  (1 + s) z + a,  s, a = W c      scale  (1 + s) z,  s = W c
    add   z + W c                         lora   z + B (W c * A x)

So of queries and values lora is a change of low rank of their projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from kizzasi.models.call import HERE, Call

Place = Literal["norm", "q", "v"]
Turn = Callable[[Tensor, Tensor], Tensor]  # of z and x, (b, t, width) or in a step (b, width)
Turns = Mapping[str, Turn]
TURNS = ("turns", HERE)  # in `Call.lent`
PLACES = ("norm", "q", "v")


class Tap(NamedTuple):
    """A place that can be turned: entries of x and of z, the heads of z, and how often a call comes
    by."""

    n_in: int
    width: int
    n_heads: int
    times: int = 1


Taps = Mapping[str, Tap]


def turned(call: Call, place: str, z: Tensor, x: Tensor) -> Tensor:
    """z as the call turns it at a place."""
    turns: Turns = call.lent.get(TURNS, {})
    return turns[place](z, x) if place in turns else z


def after(turns: Turns, place: str, turn: Turn) -> Turns:
    """The turns with one that acts before them at its place."""
    return {**turns, place: chained(turn, turns[place]) if place in turns else turn}


def chained(first: Turn, second: Turn) -> Turn:
    """Both, in this order."""
    return lambda z, x: second(first(z, x), x)


def grouped(z: Tensor, change: Tensor, op: str, n_groups: int) -> Tensor:
    """film, scale or add of z (..., width), a factor and shift of `change` for each group."""
    parts = z.unflatten(-1, (n_groups, -1))
    each = beside(z, change).unsqueeze(-1)
    if op == "film":
        factor, shift = each.chunk(2, dim=-2)
        y = parts * (1 + factor) + shift
    else:
        y = parts + each if op == "add" else parts * (1 + each)
    return y.flatten(-2)


def beside(z: Tensor, change: Tensor) -> Tensor:
    """What turns a step's only token, (b, m), beside z (b, 1, width); else as it is."""
    return change[:, None] if change.dim() < z.dim() else change


def common(each: list[Taps]) -> Taps:
    """The places that all of several layers have, and alike, which a call comes by in each."""
    found = {}
    for name in each[0]:
        taps = [one[name] for one in each if name in one]
        if len(taps) == len(each) and len({tap[:3] for tap in taps}) == 1:
            found[name] = taps[0]._replace(times=sum(tap.times for tap in taps))
    return found
