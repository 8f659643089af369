"""What attention remembers of its tokens: as it is, or in codes of few bits.

A token is coded once, when it enters, and every later one, its own included, sees it as it was
coded; so both forms agree, and any split of a sequence. Only a stencil's first positions are kept
as they are. In training gradients pass the codes as if they were not there; none pass a state.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kizzasi.models.attention.cache import (
    AttentionState,
    Layout,
    add_slot,
    append,
    empty_cache,
    pack,
)
from kizzasi.models.call import Call
from kizzasi.models.mixer import state_dtype
from kizzasi.models.ops.kv_codes import (
    KVQuant,
    code_bytes,
    decode,
    encode,
    groups_of,
    hadamard,
    scale_dtype,
    straight_through,
    turn,
)
from kizzasi.models.ops.stencil import Stencil
from kizzasi.models.state import loadable


class CodedState(NamedTuple):
    """An `AttentionState` in codes.

    k, v              (b, n_kv_heads, s, bytes) uint8.
    k_scale, v_scale  (b, n_kv_heads, s, groups).
    k_first, v_first  (b, n_kv_heads, n_global, width) the first positions as they are; their slots
                      among the codes are not read.
    position          as there.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    k_first: Tensor
    v_first: Tensor
    position: Tensor

    in_order = AttentionState.in_order
    alive = AttentionState.alive
    positions = AttentionState.positions
    places = AttentionState.places
    next_position = AttentionState.next_position
    n_alive = AttentionState.n_alive

    def packed(self, slots: int) -> CodedState:
        """As of `AttentionState`."""
        leaves, position = pack(self[:4], self.positions(), slots)
        return CodedState._make((*leaves, self.k_first, self.v_first, position))


State = AttentionState | CodedState


class Read(NamedTuple):
    """What the tokens of a call see.

    keys, values  (b, n_kv_heads, s + t, width) of the cache's slots and the call's tokens.
    own           the last of these keys and values as a query of their own group sees them, and how
                  many tokens a group has; None if all queries see the same.
    past          keys and values of the s slots.
    new           the t tokens.
    """

    keys: Tensor
    values: Tensor
    own: tuple[Tensor, Tensor, int] | None
    past: tuple[Tensor, Tensor]
    new: Any


class Entered(NamedTuple):
    """New tokens.

    k, v          (b, n_kv_heads, t, width) as they came, turned if they are coded.
    seen_k, seen_v  as they are seen.
    leaves        as they are kept.
    """

    k: Tensor
    v: Tensor
    seen_k: Tensor
    seen_v: Tensor
    leaves: tuple[Tensor, ...]


class Remembers(Protocol):
    """How a layer remembers keys and values: what attention asks of `Memory`, or of one whose
    states are others."""

    stencil: Stencil
    quant: KVQuant
    widths: tuple[int, int]

    @property
    def turns_keys(self) -> bool:
        """Whether keys, and so queries, are turned beside values."""
        ...

    def state_bytes(self, tokens: int, n_bytes: int = 4) -> int: ...
    def empty(
        self, batch: int, slots: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> Any: ...
    def turning(self, call: Call, like: Tensor) -> Tensor | None: ...
    def enter(self, k: Tensor, v: Tensor, position: Tensor, by: Tensor | None = None) -> Any: ...
    def seen(self, state: Any, like: Tensor) -> tuple[Tensor, Tensor]: ...
    def read(
        self, sight: Layout, before: Any, k: Tensor, v: Tensor, by: Tensor | None = None
    ) -> Read: ...
    def keep(self, sight: Layout, before: Any, read: Read) -> Any: ...
    def add(self, state: Any, new: Any, now: Tensor) -> Any: ...


class Memory:
    """Keys and values of a layer.

    Args:
        n_kv_heads, widths: of keys and values.
        stencil: which of them are kept.
        quant: how.
    """

    turns_keys = True

    def __init__(
        self, n_kv_heads: int, widths: tuple[int, int], stencil: Stencil, quant: KVQuant
    ) -> None:
        self.n_kv_heads, self.widths, self.stencil = n_kv_heads, widths, stencil
        self.quant: KVQuant = quant

    def state_bytes(self, tokens: int, n_bytes: int = 4) -> int:
        """Of one row after so many tokens with their positions apart, floats of so many bytes."""
        slots, first = self.stencil.slots, 0
        if self.quant != "none":
            first = self.n_kv_heads * self.stencil.n_global * sum(self.widths) * n_bytes
        return (tokens if slots is None else slots) * self.bytes_per_slot(n_bytes) + first

    def bytes_per_slot(self, n_bytes: int = 4) -> int:
        """Of one token with its position apart, for floats of so many bytes."""
        if self.quant == "none":
            return self.n_kv_heads * sum(self.widths) * n_bytes
        each = (code_bytes(w, self.quant) + 2 * groups_of(w)[0] for w in self.widths)
        return self.n_kv_heads * sum(each)

    def empty(
        self, batch: int, slots: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> State:
        """A cache of dead slots."""
        heads, quant = self.n_kv_heads, self.quant
        plain = empty_cache(batch, heads, slots, self.widths, device, dtype)
        if quant == "none":
            return plain
        like, g = plain.k, self.stencil.n_global
        codes = (
            torch.zeros(batch, heads, slots, code_bytes(w, quant), device=device, dtype=torch.uint8)
            for w in self.widths
        )
        made = scale_dtype(like.dtype)
        scales = (
            like.new_zeros(batch, heads, slots, groups_of(w)[0], dtype=made) for w in self.widths
        )
        first = (like.new_zeros(batch, heads, g, w) for w in self.widths)
        return CodedState._make((*codes, *scales, *first, plain.position))

    def seen(self, state: State, like: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n_kv_heads, s, width) keys and values of all slots, in a dtype."""
        if isinstance(state, AttentionState):
            return state.k.to(like.dtype), state.v.to(like.dtype)
        k, v = (
            decode(codes, scale, self.quant, width, like.dtype)
            for codes, scale, width in zip(state[:2], state[2:4], self.widths, strict=True)
        )
        g = state.k_first.shape[2]
        if not g or not k.shape[2]:
            return k, v
        first = (x.to(like.dtype) for x in state[4:6])
        k, v = (torch.cat([a, x[:, :, g:]], 2) for a, x in zip(first, (k, v), strict=True))
        return k, v

    def turning(self, call: Call, like: Tensor) -> Tensor | None:
        """The rotation that heads are coded in; or None."""
        return None if self.quant == "none" else turning(call, like, self.widths[0])

    def enter(self, k: Tensor, v: Tensor, position: Tensor, by: Tensor | None = None) -> Entered:
        """New keys and values (b, n_kv_heads, t, width) at (b or 1, t) positions.

        by: what they, their queries and their result are turned by; None: they are not.
        """
        if self.quant == "none":
            return Entered(k, v, k, v, (k, v))
        if by is not None:
            k, v = turn(k, by), turn(v, by)
        if k.shape == v.shape:  # together, in half as many calls
            codes, scale = encode(torch.cat([k, v], 1), self.quant)
            coded = list(zip(codes.chunk(2, 1), scale.chunk(2, 1), strict=True))
            read = decode(codes, scale, self.quant, k.shape[-1], k.dtype).chunk(2, 1)
        else:
            coded = [encode(x, self.quant) for x in (k, v)]
            read = tuple(
                decode(codes, scale, self.quant, x.shape[-1], x.dtype)
                for (codes, scale), x in zip(coded, (k, v), strict=True)
            )
        seen_k, seen_v = map(partial(self._show, position), (k, v), read)
        (k_codes, k_scale), (v_codes, v_scale) = coded
        return Entered(k, v, seen_k, seen_v, (k_codes, v_codes, k_scale, v_scale))

    def _show(self, position: Tensor, x: Tensor, read: Tensor) -> Tensor:
        """What was read of codes, but of the first positions x itself; with the gradient of x."""
        if self.stencil.n_global:
            first = (position < self.stencil.n_global)[:, None, :, None]
            read = torch.where(first, x.detach(), read)
        return straight_through(x, read)

    def read(
        self, sight: Layout, before: State, k: Tensor, v: Tensor, by: Tensor | None = None
    ) -> Read:
        """What a call sees of the cache before it and of its own tokens; see `enter`."""
        past, new = self.seen(before, v), self.enter(k, v, sight.position, by)
        keys, values = map(append, past, new[2:4])
        return Read(keys, values, None, past, new)

    def keep(self, sight: Layout, before: State, read: Read) -> State:
        """The cache after a call, laid out so, that read so."""
        past, new = read.past, read.new
        if isinstance(before, AttentionState):
            k, v = map(append, past, new.leaves)
            return sight.cache(k, v, self.stencil)
        leaves = tuple(map(append, before[:4], new.leaves))
        leaves, position = sight.kept(leaves, self.stencil)
        g, first = self.stencil.n_global, before[4:6]
        if g:
            assert sight.ring is not None, "first positions have a ring"
            of_first = sight.ring.of_first(g)
            joined = map(append, past, (new.k, new.v))
            first = tuple(of_first.take(x) for x in joined)
        return CodedState._make((*leaves, *first, position))

    def add(self, state: State, new: Entered, now: Tensor) -> State:
        """The cache with one more token, at `now` (b, 1)."""
        if isinstance(state, AttentionState):
            return state.add(new.k, new.v, now, self.stencil)
        leaves, position = add_slot(state[:4], new.leaves, state.position, now, self.stencil)
        g, first = self.stencil.n_global, state[4:6]
        if g:
            index, early = now.clamp(max=g - 1)[:, None, :, None], (now < g)[:, None, :, None]
            first = tuple(
                torch.where(early, old.to(x.dtype).scatter(2, index.expand_as(x), x), old)
                for old, x in zip(first, (new.k, new.v), strict=True)
            )
        return CodedState._make((*leaves, *first, position))


def turning(call: Call, like: Tensor, width: int) -> Tensor:
    """The rotation of heads of this width, made once for all layers of a call."""
    place = {"device": like.device, "dtype": state_dtype(like.dtype)}
    return call.once(("hadamard", width, like.dtype), lambda: hadamard(width, **place))


loadable(globals())
