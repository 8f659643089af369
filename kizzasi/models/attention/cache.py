"""The cache of attention, and who sees whom in one call.

    s         slots of the cache
    slot      one remembered key and value with its position; position -1 marks a dead slot
    stencil   which positions a query sees, and so which of them are remembered

Positions restart at 0 in every document of every row, so padding and packing leave no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.ops.precision import without_autocast
from kizzasi.models.ops.stencil import Cut, Places, Plan, Stencil, cut_up

ALL = Stencil()


class AttentionState(NamedTuple):
    """The cache.

    k, v      (b, n_kv_heads, s, width), keys after norm and rotation. One slot per token, or a ring
              of so many slots as a stencil remembers, position p in `Stencil.slot(p)`.
    position  (b, s) int64, place in the open document; -1: dead, of another document or empty.
              (b, 0) where slot i holds position i of every row, so that no slot is dead: the shape
              alone says that nothing need be masked.
    """

    k: Tensor
    v: Tensor
    position: Tensor

    @property
    def in_order(self) -> bool:
        """Slot i holds position i of every row; `position` is left out."""
        return self.position.shape[1] == 0

    @property
    def alive(self) -> Tensor | None:
        """(b, 1, 1, s) which slots the last token sees; None means all."""
        return None if self.in_order else (self.position >= 0)[:, None, None]

    def positions(self) -> Tensor:
        """(b, s), written out."""
        if not self.in_order:
            return self.position
        slots = torch.arange(self.k.shape[2], device=self.k.device)
        return slots.expand(self.k.shape[0], -1)

    def places(self) -> Places:
        """Where the slots are; dead ones in document -1."""
        position = self.positions()
        return Places(position.clamp(-1, 0), position)

    def next_position(self) -> Tensor:
        """(b,) int64, position of the next token; (1,) for all rows if the slots are in order."""
        if self.in_order:
            return self.position.new_full((1,), self.k.shape[2])
        return self.position.amax(1) + 1

    def add(self, k: Tensor, v: Tensor, now: Tensor, stencil: Stencil = ALL) -> AttentionState:
        """The cache with one more token, k and v (b, n_kv_heads, 1, width), at `now` (b, 1)."""
        leaves, position = add_slot(self[:2], (k, v), self.position, now, stencil)
        return AttentionState._make((*leaves, position))

    def n_alive(self) -> int:
        """The live slots of the row that has most; see `state.Cache`."""
        if self.in_order:
            return self.k.shape[2]
        return int((self.position >= 0).sum(1).max()) if self.position.numel() else 0

    def packed(self, slots: int) -> AttentionState:
        """The same rows with so many slots, dead ones last; a cache without a window only."""
        leaves, position = pack(self[:2], self.positions(), slots)
        return AttentionState._make((*leaves, position))


def add_slot(
    leaves: Sequence[Tensor],
    new: Sequence[Tensor],
    position: Tensor,
    now: Tensor,
    stencil: Stencil = ALL,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Leaves (b, h, s, width) of a cache and its positions, with a token more, at `now` (b, 1)."""
    if stencil.slots is None:
        if position.shape[1]:
            position = torch.cat([position, now], dim=1)
        return tuple(map(append, leaves, new)), position
    slot = stencil.slot(now)
    index = slot[:, None, :, None]
    leaves = tuple(
        old.to(x.dtype).scatter(2, index.expand_as(x), x)
        for old, x in zip(leaves, new, strict=True)
    )
    return leaves, position.scatter(1, slot, now)


def pack(
    leaves: Sequence[Tensor], position: Tensor, slots: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same rows with so many slots, dead ones last; a cache that keeps all only."""
    order = (position < 0).long().argsort(dim=1, stable=True)
    spare = slots - position.shape[1]  # below 0: slots that are dead in every row

    def take(leaf: Tensor) -> Tensor:
        index = order[:, None, :, None].expand_as(leaf)
        return F.pad(leaf.gather(2, index), (0, 0, 0, spare))

    position = F.pad(position.gather(1, order), (0, spare), value=-1)
    return tuple(map(take, leaves)), position


def empty_cache(
    batch: int,
    n_kv_heads: int,
    slots: int,
    widths: tuple[int, int],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> AttentionState:
    """A cache of dead slots for keys and values of the given widths."""
    k, v = (
        torch.zeros(batch, n_kv_heads, slots, width, device=device, dtype=dtype) for width in widths
    )
    position = torch.full((batch, slots), -1, dtype=torch.int64, device=device)
    return AttentionState(k, v, position)


class Lent(NamedTuple):
    """Keys and values of a call's tokens (b, n_kv_heads, t, width), as they enter the cache, and
    the cache before them: all that another layer needs to read what this one reads."""

    k: Tensor
    v: Tensor
    before: Any


class Ring(NamedTuple):
    """What a ring keeps of s + t slots, position p in slot(p): (b, slots) where it stands among
    them, which slots are dead, and the positions."""

    source: Tensor
    dead: Tensor
    position: Tensor

    def of_first(self, n: int) -> Ring:
        """Of the first so many slots alone."""
        return Ring(*(x[:, :n] for x in self))

    def take(self, slots: Tensor) -> Tensor:
        """Of (b, n_kv_heads, s + t, width). Dead slots are zero."""
        there = self.source[:, None, :, None].expand(-1, slots.shape[1], -1, slots.shape[3])
        return slots.gather(2, there).masked_fill(self.dead[:, None, :, None], 0.0)


class Slots(Protocol):
    """What lays out a call asks of a cache, an `AttentionState` or one in codes."""

    @property
    def k(self) -> Tensor: ...
    @property
    def position(self) -> Tensor: ...
    @property
    def in_order(self) -> bool: ...
    @property
    def alive(self) -> Tensor | None: ...
    def positions(self) -> Tensor: ...
    def places(self) -> Places: ...
    def next_position(self) -> Tensor: ...


class Layout(NamedTuple):
    """Where the t tokens of a call stand, and the s slots of the cache before them.

    document, position          (b, t) of the tokens; see `Call`.
    key_document, key_position  (b, s + t) of all that they may see.
    last                        (b,) position of the last token, -1 if it is padding.
    counted                     names how the positions were counted.
    ring                        what is kept, if not everything.
    alike                       no slot is dead and no row differs from another: the first four have
                                one row for all.
    """

    document: Tensor
    position: Tensor
    key_document: Tensor
    key_position: Tensor
    last: Tensor
    alike: bool
    counted: str
    ring: Ring | None = None

    @property
    def query(self) -> Places:
        return Places(self.document, self.position)

    @property
    def key(self) -> Places:
        return Places(self.key_document, self.key_position)

    def visible(self, stencil: Stencil = ALL) -> Tensor | None:
        """(b or 1, 1, t, s + t) bool; None where `attention` knows it from `causal` alone."""
        t, s = self.position.shape[1], self.key_position.shape[1]
        if self.alike and s == t and stencil.covers(t):
            return None
        return stencil.visible(self.query, self.key)

    def cache(self, k: Tensor, v: Tensor, stencil: Stencil = ALL) -> AttentionState:
        """What is kept of all slots and tokens, k and v (b, n_kv_heads, s + t, width)."""
        leaves, position = self.kept((k, v), stencil)
        return AttentionState._make((*leaves, position))

    def kept(
        self, leaves: Sequence[Tensor], stencil: Stencil = ALL
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of leaves (b, n_kv_heads, s + t, width) what is kept, and its positions."""
        if stencil.slots is not None:
            assert self.ring is not None, "laid out for this stencil"
            return tuple(map(self.ring.take, leaves)), self.ring.position
        if self.alike:
            return tuple(leaves), self.last.new_empty(len(self.last), 0)
        alive = (self.key_document == self.document[:, -1:]) & (self.last >= 0)[:, None]
        # Zeros: nobody sees a dead slot, but a weight of zero does not hide NaN.
        dead = ~alive[:, None, :, None]
        shown = tuple(x.masked_fill(dead, 0.0) for x in leaves)
        return shown, torch.where(alive, self.key_position, -1)


def layout(call: Call, state: Slots, stencil: Stencil = ALL) -> Layout:
    """Lay out a call after a cache; the layers of one call that remember alike share the result.

    Padding is a document of its own: it sees itself, so that nothing is ever divided by zero.
    """
    key = _key("layout", state, stencil)
    return call.once(key, lambda: _lay_out(call, state, stencil, key))


def now(call: Call, state: Slots, stencil: Stencil = ALL) -> tuple[Tensor, str]:
    """(b or 1, 1) position of a step's token, and the name by which it was counted."""
    key = _key("now", state, stencil)
    return call.once(key, lambda: state.next_position()[:, None]), key


def visible(call: Call, state: Slots, stencil: Stencil = ALL) -> Tensor | None:
    """`Layout.visible`, made once for all layers of a call that see alike."""
    sight = layout(call, state, stencil)
    key = _key(f"visible {stencil.causal}", state, stencil)
    return call.once(key, lambda: sight.visible(stencil))


def seen_now(call: Call, after: Slots, query: Places, stencil: Stencil = ALL) -> Tensor | None:
    """(b, 1, 1, s) which slots of a cache its last token, at `query`, sees; None means all.

    A ring of a plain window holds nothing else."""
    if stencil.dilation == 1 and stencil.block is None:
        return after.alive
    key = _key("seen now", after, stencil)
    return call.once(key, lambda: stencil.visible(query, after.places()))


def in_time(call: Call, state: Slots, stencil: Stencil) -> tuple[Tensor, Places]:
    """(b, s) the slots of a ring as `stencil_attention` wants them, and all keys so ordered."""

    def make() -> tuple[Tensor, Places]:
        sight, g = layout(call, state, stencil), stencil.n_global
        late = state.position[:, g:].argsort(dim=1, stable=True) + g
        order = torch.cat([torch.arange(g, device=late.device).expand(len(late), -1), late], 1)
        n = order.shape[1]
        ordered = (torch.cat([x[:, :n].gather(1, order), x[:, n:]], 1) for x in sight.key)
        return order, Places(*ordered)

    return call.once(_key("in time", state, stencil), make)


def cut(call: Call, state: Slots, stencil: Stencil, plan: Plan, key: Places) -> Cut:
    """`cut_up`, made once for all layers of a call that see alike."""
    query = layout(call, state, stencil).query
    made = _key("cut", state, stencil)
    return call.once(made, lambda: cut_up(query, key, stencil, plan))


def _key(name: str, state: Slots, stencil: Stencil) -> str:
    """What tells apart the caches of one model's layers, which have all seen the same tokens."""
    return f"{name} after {state.k.shape[2]}, in order {state.in_order}, {stencil}"


def _lay_out(call: Call, state: Slots, stencil: Stencil, counted: str) -> Layout:
    rows, alike = len(state.position), call.segments is None and state.in_order
    document, position = call.places(state.next_position())
    before = state.positions()[: len(position)]
    key_document = torch.cat([before.clamp(-1, 0), document], dim=1)
    key_position = torch.cat([before, position], dim=1)
    last = position[:, -1].expand(rows)
    if call.real is not None:
        last = torch.where(call.real[:, -1], last, -1)
    s, t, ring = key_position.shape[1], position.shape[1], None
    if stencil.slots is not None:
        ring = _keep(last, s, t, stencil)
    return Layout(document, position, key_document, key_position, last, alike, counted, ring)


def append(old: Tensor, new: Tensor) -> Tensor:
    """Join along the slots, in the dtype of the new ones: autocast may have changed since."""
    if not old.shape[2]:
        return new
    with without_autocast(new):
        return torch.cat([old.to(new.dtype), new], dim=2)


def _keep(last: Tensor, s: int, t: int, stencil: Stencil) -> Ring:
    """Which of s slots, the earlier ring's and then t new ones, stay in a ring.

    Args:
        last: (b,) int64, last position of the open document; -1 if none is open.
    """
    n_global, span = stencil.n_global, stencil.span
    assert span is not None, "a ring"
    slot = torch.arange(n_global + span, device=last.device)
    age, lowest = (last[:, None] - slot) % span, 0
    if n_global:
        first = slot < n_global
        age = torch.where(first, last[:, None] - slot, age)
        lowest = (~first).long() * n_global
    position = last[:, None] - age
    dead = position < lowest
    if n_global:
        dead = dead | (age < 0)
    source = torch.where(age < t, s - 1 - age, slot).clamp(0, s - 1)  # new, or where it was
    return Ring(source, dead, position.masked_fill(dead, -1))
