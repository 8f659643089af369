"""The cache of attention, and who sees whom in one call.

    s         slots of the cache
    slot      one remembered key and value with its position; position -1 marks a dead slot
    window    how many positions a query sees, its own included

Positions restart at 0 in every document of every row, so padding and packing leave no trace.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.ops.attention import visibility


class AttentionState(NamedTuple):
    """The cache.

    k, v      (b, n_kv_heads, s, width), keys after norm and rotation. Without a window one slot per
              token; with one, a ring of `window` slots, position p in p % window.
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

    def next_position(self) -> Tensor:
        """(b,) int64, position of the next token; (1,) for all rows if the slots are in order."""
        if self.in_order:
            return self.position.new_full((1,), self.k.shape[2])
        return self.position.amax(1) + 1

    def add(self, k: Tensor, v: Tensor, now: Tensor, window: int | None = None) -> AttentionState:
        """The cache with one more token, k and v (b, n_kv_heads, 1, width), at `now` (b, 1)."""
        position = self.position
        if window is None:
            k, v = append(self.k, k), append(self.v, v)
            if not self.in_order:
                position = torch.cat([position, now], dim=1)
        else:
            slot = now % window
            position = position.scatter(1, slot, now)
            index = slot[:, None, :, None]
            k = self.k.to(k.dtype).scatter(2, index.expand_as(k), k)
            v = self.v.to(v.dtype).scatter(2, index.expand_as(v), v)
        return AttentionState(k, v, position)

    def n_alive(self) -> int:
        """The live slots of the row that has most; see `state.Cache`."""
        if self.in_order:
            return self.k.shape[2]
        return int((self.position >= 0).sum(1).max()) if self.position.numel() else 0

    def packed(self, slots: int) -> AttentionState:
        """The same rows with so many slots, dead ones last; a cache without a window only."""
        position = self.positions()
        order = (position < 0).long().argsort(dim=1, stable=True)
        spare = slots - position.shape[1]  # below 0: slots that are dead in every row

        def take(leaf: Tensor) -> Tensor:
            index = order[:, None, :, None].expand_as(leaf)
            return F.pad(leaf.gather(2, index), (0, 0, 0, spare))

        position = F.pad(position.gather(1, order), (0, spare), value=-1)
        return AttentionState(take(self.k), take(self.v), position)


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


class Layout(NamedTuple):
    """Where the t tokens of a call stand, and the s slots of the cache before them.

    document, position          (b, t) of the tokens; see `Call`.
    key_document, key_position  (b, s + t) of all that they may see.
    last                        (b,) position of the last token, -1 if it is padding.
    counted                     names how the positions were counted.
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

    def visible(self, window: int | None = None, causal: bool = True) -> Tensor | None:
        """(b or 1, 1, t, s + t) bool; None where `attention` knows it from `causal` alone."""
        t, s = self.position.shape[1], self.key_position.shape[1]
        if self.alike and s == t and (window is None or t <= window):
            return None
        return visibility(
            self.document, self.position, self.key_document, self.key_position, window, causal
        )

    def cache(self, k: Tensor, v: Tensor, window: int | None = None) -> AttentionState:
        """What is kept of all slots and tokens, k and v (b, n_kv_heads, s + t, width)."""
        if window is not None:
            return _ring(k, v, self.last, self.position.shape[1], window)
        if self.alike:
            return AttentionState(k, v, self.last.new_empty(len(self.last), 0))
        alive = (self.key_document == self.document[:, -1:]) & (self.last >= 0)[:, None]
        # Zeros: nobody sees a dead slot, but a weight of zero does not hide NaN.
        k, v = (x.masked_fill(~alive[:, None, :, None], 0.0) for x in (k, v))
        return AttentionState(k, v, torch.where(alive, self.key_position, -1))


def layout(call: Call, state: AttentionState, window: int | None = None) -> Layout:
    """Lay out a call after a cache; the layers of one call that remember alike share the result.

    Padding is a document of its own: it sees itself, so that nothing is ever divided by zero.
    """
    key = _key("layout", state, window)
    return call.once(key, lambda: _lay_out(call, state, key))


def now(call: Call, state: AttentionState, window: int | None = None) -> tuple[Tensor, str]:
    """(b or 1, 1) position of a step's token, and the name by which it was counted."""
    key = _key("now", state, window)
    return call.once(key, lambda: state.next_position()[:, None]), key


def visible(
    call: Call, state: AttentionState, window: int | None = None, causal: bool = True
) -> Tensor | None:
    """`Layout.visible`, made once for all layers of a call that see alike."""
    sight = layout(call, state, window)
    key = _key(f"visible {causal}", state, window)
    return call.once(key, lambda: sight.visible(window, causal))


def _key(name: str, state: AttentionState, window: int | None) -> str:
    """What tells apart the caches of one model's layers, which have all seen the same tokens."""
    return f"{name} after {state.k.shape[2]}, in order {state.in_order}, window {window}"


def _lay_out(call: Call, state: AttentionState, counted: str) -> Layout:
    rows, alike = len(state.position), call.segments is None and state.in_order
    document, position = call.places(state.next_position())
    before = state.positions()[: len(position)]
    key_document = torch.cat([before.clamp(-1, 0), document], dim=1)
    key_position = torch.cat([before, position], dim=1)
    last = position[:, -1].expand(rows)
    if call.real is not None:
        last = torch.where(call.real[:, -1], last, -1)
    return Layout(document, position, key_document, key_position, last, alike, counted)


def append(old: Tensor, new: Tensor) -> Tensor:
    """Join along the slots, in the dtype of the new ones: autocast may have changed since."""
    return torch.cat([old.to(new.dtype), new], dim=2) if old.shape[2] else new


def _ring(k: Tensor, v: Tensor, last: Tensor, t: int, window: int) -> AttentionState:
    """The last `window` tokens of the open document, position p in slot p % window.

    Args:
        k, v: (b, n_kv_heads, s, width), the earlier ring if there is one, then t new slots.
        last: (b,) int64, last position of the open document; -1 if none is open.
    """
    s = k.shape[2]
    slot = torch.arange(window, device=k.device)
    age = (last[:, None] - slot) % window
    position = (last[:, None] - age).clamp(min=-1)
    source = torch.where(age < t, s - 1 - age, slot).clamp(max=s - 1)  # new, or where it was
    index, dead = source[:, None, :, None], (position < 0)[:, None, :, None]

    def take(slots: Tensor) -> Tensor:
        there = index.expand(-1, slots.shape[1], -1, slots.shape[3])
        return slots.gather(2, there).masked_fill(dead, 0.0)

    return AttentionState(take(k), take(v), position)
